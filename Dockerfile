# The server for one model, which is mounted:
#   docker build -t fastconformer .
#   docker run -p 8000:8000 -v /srv/model.nemo:/model.nemo:ro -e FASTCONFORMER_API_KEY=... fastconformer
# TORCH names a folder of https://download.pytorch.org/whl; with CUDA:
#   docker build -t fastconformer:cuda --build-arg TORCH=cu128 .
#   docker run --gpus all ... fastconformer:cuda --model /model.nemo --device cuda --dtype bfloat16
FROM python:3.12-slim

ARG TORCH=cpu
# Triton, which CUDA builds of torch bring, calls a C compiler on the card's machine
RUN if [ "${TORCH}" != cpu ]; then apt-get update && apt-get install -y --no-install-recommends \
    gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/${TORCH}

WORKDIR /app
COPY setup.py pyproject.toml README.md LICENSE constraints.txt ./
COPY fastconformer fastconformer
COPY rwkv_cuda rwkv_cuda
COPY training training
COPY converters converters
COPY benchmarks benchmarks
# the home holds what numba and Triton have compiled
RUN pip install --no-cache-dir ".[serve,media,fast,llm]" && useradd --create-home served

USER served
EXPOSE 8000
HEALTHCHECK CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"
# inside, every address is the container's own; what is open to others is said by `docker run -p`
ENTRYPOINT ["python", "-m", "fastconformer.serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "/model.nemo"]

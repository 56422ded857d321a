"""A server for one model, with OpenAI's transcription API: `python -m fastconformer.serve`.

python -m fastconformer.serve --model model.nemo --port 8000
curl -F file=@talk.wav http://127.0.0.1:8000/v1/audio/transcriptions
"""

import contextlib
import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np

from . import cli
from .text import read_text


def parse_arguments(argv=None):
    parser = cli.parser(
        "fastconformer.serve",
        "Serve a model over HTTP: OpenAI's transcription API, and a page at /.",
        "--model model.nemo --port 8000",
    )
    cli.add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--name", help="the model's name for clients (its file's)")
    parser.add_argument(
        "--api-key",
        metavar="K",
        help="what clients must send; also the variable FASTCONFORMER_API_KEY",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    parser.add_argument(
        "--max-upload-mb", type=float, default=25.0, help="of one file (%(default)s)"
    )
    parser.add_argument(
        "--max-duration-s", type=float, default=4 * 3600.0, help="of its audio (%(default)s)"
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait (%(default)s)",
    )
    parser.add_argument(
        "--max-streams", type=int, default=32, metavar="N", help="live at a time (%(default)s)"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=600.0, help="for one request (%(default)s)"
    )
    parser.add_argument(
        "--wyoming-port", type=int, metavar="P", help="also serve home assistants' Wyoming there"
    )
    parser.add_argument(
        "--wyoming-languages", metavar="CODES", help="told to them, with that port (en)"
    )
    return parser.parse_args(argv)


def api_keys(args) -> list[str]:
    """Keys of the flag, the environment and the file. ValueError: a file without one."""
    keys = [key for key in (args.api_key, os.environ.get("FASTCONFORMER_API_KEY")) if key]
    if args.api_key_file is not None:
        lines = read_text(args.api_key_file).splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"{args.api_key_file} holds no key")
        keys += found
    return keys


def main(argv=None) -> int:
    args = parse_arguments(argv)
    return cli.run("serve", lambda: serve(args))


def serve(args) -> int:
    limits = "max_upload_mb", "max_duration_s", "max_queue", "max_streams", "timeout_s"
    cli.check_above_zero(args, *limits)
    if args.wyoming_languages is not None and args.wyoming_port is None:
        raise cli.UsageError("--wyoming-languages are told at --wyoming-port, which is not given")
    keys = api_keys(args)
    for port in (args.port, args.wyoming_port):
        if port is not None:
            check_address(args.host, port)
    for package in ("starlette", "uvicorn", "python_multipart", "websockets"):
        if importlib.util.find_spec(package) is None:
            raise cli.Failed(f"{package} is missing: pip install 'fastconformer[serve]'")
    import uvicorn

    from .serving import wyoming
    from .serving.app import Limits, Service, make_app
    from .serving.batcher import Batcher
    from .serving.gate import Protocol
    from .serving.live import LARGEST_EVENT

    model = cli.load_model(args)
    # what a first text imports and compiles (with numba 100 MB) is there before clients come
    model.transcribe([np.zeros(model.sample_rate, np.float32)], head=args.head)
    limits = Limits(
        int(args.max_upload_mb * 2**20), args.max_duration_s, args.timeout_s, args.max_streams
    )
    name = args.name or Path(args.model).name.removesuffix(".nemo")
    batcher = Batcher(model, args.batch_size, args.max_queue, args.max_duration_s)
    beside = contextlib.nullcontext()
    if args.wyoming_port is not None:
        listener = socket.create_server((args.host, args.wyoming_port), family=_family(args.host))
        card = wyoming.Card(name, tuple((args.wyoming_languages or "en").split(",")))
        idle_s, most = args.timeout_s, args.max_streams
        beside = wyoming.serving(listener, batcher, card, args.head, idle_s, most)
        print(f"serve: Wyoming at {args.host}:{args.wyoming_port}", file=sys.stderr)
    app = make_app(Service(batcher, name, args.head, keys, limits), beside)
    if args.host not in ("127.0.0.1", "::1", "localhost") and not keys:
        print(f"serve: {args.host} is open to others and no --api-key is set", file=sys.stderr)
    elif keys and args.wyoming_port is not None:
        print("serve: Wyoming has no keys: its port is open to whoever reaches it", file=sys.stderr)
    print(f"serve: {name} at http://{args.host}:{args.port}", file=sys.stderr, flush=True)
    _allow_connections()
    # uvicorn drains on SIGTERM, then raises it again: a server that has finished ends with 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=int(args.timeout_s),
        http=Protocol,
        h11_max_incomplete_event_size=1 << 16,
        server_header=False,
        ws_max_size=LARGEST_EVENT,
    )
    return 0


def check_address(host: str, port: int) -> None:
    """Failed: nobody can listen there, told before the model is read; UsageError: no port."""
    if not 0 <= port <= 65535:
        raise cli.UsageError(f"the port is {port}, expected 0 to 65535")
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        reason = error.strerror.partition(" (while")[0]
        raise cli.Failed(f"cannot listen at {host}:{port}: {reason}; choose another") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())

"""The README.md of a model on the hub: what it is, its data, error rates, base and licence.

Front matter is the hub's; error rates come from what `fastconformer.evaluate -o` wrote, each with
its normaliser. What is not known is said to be unknown, never made up.
"""

import json
import re
from pathlib import Path

import yaml

from ..config import ModelConfig

UNKNOWN = "not stated"


def model_card(
    name: str,
    config: ModelConfig,
    head: str,
    library: str,
    results: list[dict] = (),
    recipe: dict | None = None,
    licence: str | None = None,
    base: str | None = None,
    languages: list[str] = (),
) -> str:
    """The card's text. `library` is "transformers" or "nemo"; `results` are of `evaluate`, `recipe`
    is a run's recipe.yaml."""
    recipe = recipe or {}
    base = base or (recipe.get("model") or {}).get("init_from")
    front = {
        "license": licence or "other",
        "language": list(languages) or None,
        "library_name": library,
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["automatic-speech-recognition", "FastConformer", head.upper()],
        "base_model": base if base and _is_hub_id(base) else None,
        "model-index": [{"name": name, "results": _index(results)}] if results else None,
    }
    front = {key: value for key, value in front.items() if value is not None}
    encoder, n_hours = config.encoder, _hours(results)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Speech recognition: a FastConformer encoder ({encoder.n_layers} layers of "
        f"{encoder.d_model}, {config.preprocessor.features} mels, {encoder.frame_factor}-fold "
        f"subsampling) with a {head.upper()} head over {config.vocab_size} tokens, "
        f"{config.sample_rate} Hz.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base or UNKNOWN} |",
        f"| licence | {licence or UNKNOWN}; a base model's own licence holds as well |",
        f"| languages | {', '.join(languages) or UNKNOWN} |",
        f"| training data | {', '.join(_data(recipe)) or UNKNOWN} |",
        f"| steps, batch | {_training(recipe)} |",
        "",
        "## Error rates",
        "",
    ]
    if results:
        lines += [
            f"{n_hours:.2f} h in all; normalised: both texts through the normaliser first.",
            "",
            "| set | clips | normaliser | WER | CER | WER as written |",
            "|---|---|---|---|---|---|",
            *(
                f"| {_set(r)} | {r['n_utterances']} | {r['normalizer']} | "
                f"{_percent(r['normalized'], 'wer')} | {_percent(r['normalized'], 'cer')} | "
                f"{_percent(r['raw'], 'wer')} |"
                for r in results
            ),
        ]
    else:
        lines.append("None measured. `python -m fastconformer.evaluate MANIFEST -o FILE` does it.")
    lines += ["", "## Use", "", *_use(name, library), ""]
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
        lines += ["## Recipe", "", "```yaml", text, "```", ""]
    return "\n".join(lines)


def read_recipe(path: Path) -> dict:
    """A run's recipe.yaml. ValueError: it is none."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no recipe")
    return recipe


def read_evaluation(path: Path) -> dict:
    """What `fastconformer.evaluate -o` wrote. ValueError: it did not."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        _ = results["n_utterances"], results["normalizer"], results["normalized"]["wer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of fastconformer.evaluate: {error!r}") from None
    return results


def _is_hub_id(name: str) -> bool:
    """owner/name, and no file or folder here."""
    is_path = name.endswith((".nemo", ".yaml")) or Path(name).exists()
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not is_path


def _set(results: dict) -> str:
    return Path(str(results.get("manifest", UNKNOWN))).stem


def _percent(counts: dict, key: str) -> str:
    return f"{100 * counts[key]:.2f} %" if counts.get(key) is not None else UNKNOWN


def _hours(results) -> float:
    return sum(r.get("audio_s") or 0.0 for r in results) / 3600


def _index(results) -> list[dict]:
    return [
        {
            "task": {"type": "automatic-speech-recognition"},
            "dataset": {"name": _set(r), "type": _set(r)},
            "metrics": [
                {
                    "type": "wer",
                    "name": f"WER, normaliser {r['normalizer']}",
                    "value": round(100 * r["normalized"]["wer"], 2),
                }
            ],
        }
        for r in results
    ]


def _data(recipe: dict) -> list[str]:
    found = (recipe.get("data") or {}).get("train") or []
    found = found.values() if isinstance(found, dict) else found
    paths = [item.get("manifest", item) if isinstance(item, dict) else item for item in found]
    return [Path(str(path)).name if "/" not in str(path) else str(path) for path in paths]


def _training(recipe: dict) -> str:
    trainer, data = recipe.get("trainer") or {}, recipe.get("data") or {}
    if not trainer.get("max_steps"):
        return UNKNOWN
    return f"{trainer['max_steps']} of up to {data.get('batch_size', '?')} clips"


def _use(name: str, library: str) -> list[str]:
    if library == "transformers":
        return [
            "```python",
            "from transformers import pipeline",
            f'print(pipeline("automatic-speech-recognition", "{name}")("audio.wav")["text"])',
            "```",
        ]
    return [
        "```python",
        "from nemo.collections.asr.models import ASRModel",
        f'print(ASRModel.restore_from("{name}.nemo").transcribe(["audio.wav"]))',
        "```",
    ]

"""NeMo's model config: the one file that knows its keys.

`sections` reads a resolved `model_config.yaml` into the frozen, checked dataclasses of this folder.
Options that change the numbers and that this library does not implement raise a `ValueError` naming
the key; they are never guessed.
"""

import copy
from dataclasses import MISSING, fields, replace

from .checks import config_errors, require
from .encoder import AdapterConfig, EncoderConfig
from .heads import (
    CTC_CLASSES,
    HEADS_OF_CLASS,
    HYBRID_CLASSES,
    PROMPTED_CLASSES,
    TRANSDUCER_CLASSES,
    AEDConfig,
    CTCConfig,
    JointConfig,
    LossConfig,
    PredictionConfig,
    PromptsConfig,
    TransformerConfig,
)
from .preprocessor import PreprocessorConfig

ADAPTERS_OF_ALL = "global_cfg"  # in `adapters`, beside those by name


@config_errors()
def sections(cfg: dict) -> dict:
    """NeMo's resolved model config as the fields of `ModelConfig`.

    Raises:
        ValueError: a class or an option that is not supported, or a section that is missing;
            the message names the key.
    """
    cfg = copy.deepcopy(cfg)
    class_name = _class_name(cfg)
    names = HEADS_OF_CLASS[class_name]
    decoder = ("transf_decoder", "head") if "aed" in names else ("decoder",)
    for section in ("preprocessor", "encoder", *decoder):
        require(isinstance(cfg.get(section), dict), f"the config has no section {section!r}")
    preprocessor = _preprocessor(cfg["preprocessor"])
    encoder = replace(_encoder(cfg["encoder"]), adapters=_adapters(cfg))
    require(
        encoder.feat_in == preprocessor.n_features,
        f"encoder.feat_in is {encoder.feat_in} but the preprocessor gives "
        f"{preprocessor.n_features}",
    )
    parts = {}
    for name in names:
        parts |= HEAD_SECTIONS[name](cfg, encoder, names)
    joint, ctc = parts.get("joint"), parts.get("ctc")
    require(
        joint is None or ctc is None or ctc.vocab_size == joint.vocab_size,
        f"aux_ctc has {ctc and ctc.vocab_size} tokens, the joint {joint and joint.vocab_size}",
    )
    loss = _aed_loss(cfg) if "aed" in parts else _loss(cfg, joint, ctc)
    transducer = "tdt" if loss.durations else "rnnt"
    if "vocab_size" not in parts:  # all sections agree on it
        parts["vocab_size"] = next(iter(parts.values())).vocab_size
    return dict(
        nemo=cfg,
        class_name=class_name,
        heads=tuple(transducer if name == "transducer" else name for name in names),
        preprocessor=preprocessor,
        encoder=encoder,
        loss=loss,
        prompts=_prompts(cfg, class_name, encoder),
        **parts,
        **_decoding(cfg.get("decoding") or {}),
    )


def _class_name(cfg: dict) -> str:
    name = str(cfg.get("target", "")).rsplit(".", 1)[-1]
    if not name:  # archives of the first NeMo versions do not name their class
        other = TRANSDUCER_CLASSES if "joint" in cfg else CTC_CLASSES
        name = (HYBRID_CLASSES if "aux_ctc" in cfg else other)[1]
    require(
        name in HEADS_OF_CLASS,
        f"target: model class {name!r} is not supported; supported are {', '.join(HEADS_OF_CLASS)}",
    )
    return name


def _preprocessor(data: dict) -> PreprocessorConfig:
    target = data.get("_target_", "AudioToMelSpectrogramPreprocessor")
    section = _parse(
        PreprocessorConfig,
        "preprocessor",
        data,
        ignored=(
            "max_duration",
            "rng",
            "nb_max_freq",
            "stft_conv",
            "stft_exact_pad",
            "use_grads",
        ),
        off={"nb_augmentation_prob": (0, 0.0), "use_torchaudio": (False,)},
    )
    require(
        str(target).endswith("AudioToMelSpectrogramPreprocessor"),
        f"preprocessor._target_ {target!r} is not supported",
    )
    return section


def _encoder(data: dict) -> EncoderConfig:
    target = data.get("_target_", "ConformerEncoder")
    require(
        # what NeMo's adapter script leaves behind, with or without adapters in it
        str(target).endswith(("ConformerEncoder", "ConformerEncoderAdapter")),
        f"encoder._target_ {target!r} is not supported",
    )
    return _parse(
        EncoderConfig,
        "encoder",
        data,
        ignored=(
            "pos_emb_max_len",
            "subsampling_conv_chunking_factor",
            "use_pytorch_sdpa",
            "use_pytorch_sdpa_backends",
            "sync_max_audio_length",
            "att_chunk_context_size",
        ),
        off={
            # dcc: dynamic chunks of convolutions, which NeMo 3.0 only uses in streaming
            "conv_context_style": ("regular", "dcc"),
            "conv_dual_mode": (False,),
        },
    )


def _adapters(cfg: dict) -> tuple[AdapterConfig, ...]:
    """The enabled adapters of the encoder's layers, in NeMo's order."""
    found = []
    section = cfg.get("adapters") or {}
    modules = ((section.get(ADAPTERS_OF_ALL) or {}).get("adapter_meta_cfg") or {}).get(
        "modules"
    ) or {}
    for name, data in section.items():
        if name == ADAPTERS_OF_ALL or not data.get("enabled", True):
            continue
        kind = str(data.get("_target_")).rpartition(".")[2]
        strategy = (data.get("adapter_strategy") or {}).get(
            "_target_", "ResidualAddAdapterStrategy"
        )
        require(
            kind == "LinearAdapter" and str(strategy).endswith("ResidualAddAdapterStrategy"),
            f"adapters.{name} is a {kind}, added by {str(strategy).rpartition('.')[2]}; supported "
            "are LinearAdapters, added to their input; disable it in NeMo and save again",
        )
        require(
            modules.get(name, "") in ("", "encoder"),
            f"adapters.{name} belongs to {modules.get(name)}; supported are the encoder's; disable "
            "it in NeMo and save again",
        )
        ignored = ("enabled", "adapter_strategy")
        found.append(_parse(AdapterConfig, f"adapters.{name}", {"name": name, **data}, ignored))
    return tuple(found)


def _prompts(cfg: dict, class_name: str, encoder: EncoderConfig) -> PromptsConfig | None:
    """What a class with prompts can be asked for; None: it has none, or does not use them."""
    defaults = cfg.get("model_defaults") or {}
    if class_name not in PROMPTED_CLASSES or not defaults.get("initialize_prompt_feature"):
        return None
    width, names = defaults.get("enc_hidden"), defaults.get("prompt_dictionary")
    require(
        width == encoder.d_out,
        f"model_defaults.enc_hidden is {width!r}, but the encoder gives {encoder.d_out}",
    )
    require(
        isinstance(names, dict) and bool(names),
        "model_defaults.prompt_dictionary is empty: the model can be asked for no language",
    )
    return PromptsConfig(names, defaults.get("num_prompts", 128))


def _decoding(data: dict) -> dict:
    greedy = data.get("greedy") or {}
    max_symbols = greedy.get("max_symbols") or greedy.get("max_symbols_per_step")
    if not greedy.keys() & {"max_symbols", "max_symbols_per_step"}:
        max_symbols = 10  # of archives older than the option
    require(
        max_symbols is None or (isinstance(max_symbols, int) and max_symbols > 0),
        f"decoding.greedy.max_symbols is {max_symbols!r}, expected at least 1, or null",
    )
    return dict(
        max_symbols=max_symbols,
        segment_separators=tuple(data.get("segment_seperators") or (".", "!", "?")),
        segment_gap_frames=data.get("segment_gap_threshold"),
    )


def _ctc(cfg: dict, encoder: EncoderConfig, heads: tuple) -> dict:
    if heads == ("ctc",):
        return {"ctc": _ctc_section("decoder", cfg["decoder"], encoder.d_out)}
    require(isinstance(cfg.get("aux_ctc"), dict), "the config has no section 'aux_ctc'")
    data = cfg["aux_ctc"].get("decoder") or {}
    return {"ctc": _ctc_section("aux_ctc.decoder", data, encoder.d_out)}


def _transducer(cfg: dict, encoder: EncoderConfig, heads: tuple) -> dict:
    require(isinstance(cfg.get("joint"), dict), "the config has no section 'joint'")
    joint = _joint_section(cfg["joint"], encoder.d_out, cfg["decoder"])
    return {"joint": joint, "decoder": _prediction_section(cfg["decoder"], joint.vocab_size)}


def _aed(cfg: dict, encoder: EncoderConfig, heads: tuple) -> dict:
    section, head = cfg["transf_decoder"], cfg["head"]
    numbers = section.get("config_dict")
    require(isinstance(numbers, dict), "transf_decoder.config_dict is missing")
    for key in section:
        known = ("_target_", "model_name", "pretrained", "encoder", "config_dict", "library")
        require(
            key in (*known, "pre_ln_final_layer_norm"),
            f"transf_decoder.{key} is not a known option (its value is {section[key]!r})",
        )
    own = {f.name for f in fields(AEDConfig)}
    layers = {key: value for key, value in numbers.items() if key not in own}
    layers["pre_ln_final_layer_norm"] = section.get("pre_ln_final_layer_norm", True)
    between = cfg.get("transf_encoder")
    _head_section(head)
    decoding = cfg.get("decoding") or {}
    beam = str(decoding.get("strategy") or "beam").startswith("beam")
    return {
        "aed": AEDConfig(
            vocab_size=_count("head", head.get("num_classes"), ()),
            decoder=_parse(TransformerConfig, "transf_decoder.config_dict", layers),
            encoder=_parse(TransformerConfig, "transf_encoder", between, off={"mask_future": (0,)})
            if between and between.get("num_layers")
            else None,
            prompt_format=cfg.get("prompt_format") or "canary",
            prompt_defaults=_prompt_defaults(cfg.get("prompt_defaults")),
            prompt_values=cfg.get("prompt_values") or {},
            head_dropout=head.get("dropout") or 0.0,
            max_generation_delta=(decoding.get("beam" if beam else "greedy") or {}).get(
                "max_generation_delta", -1
            ),
            one_more=beam,
            **{key: numbers[key] for key in own & numbers.keys() - {"vocab_size"}},
        )
    }


def _head_section(data: dict) -> None:
    off = {"num_layers": (1,), "log_softmax": (True,)}
    for key, value in data.items():
        known = "_target_ hidden_size num_classes dropout activation use_transformer_init"
        require(
            key in known.split() or (key in off and value in off[key]),
            f"head.{key} is {value!r}, which is not supported",
        )


def _prompt_defaults(turns: list | None) -> dict:
    """NeMo's list of turns with slots -> the slots of the user's turn."""
    slots = {}
    for turn in turns or ():
        if turn.get("role") == "user":
            slots = {key: value for key, value in turn["slots"].items() if value is not None}
    return slots


# What reads the sections that a head owns: (NeMo's config, encoder, the class's heads) -> fields of
# ModelConfig.
HEAD_SECTIONS = {"ctc": _ctc, "transducer": _transducer, "aed": _aed}


def _parse(cls, section: str, data: dict, ignored: tuple = (), off: dict | None = None):
    """Builds dataclass `cls` from the mapping `data`.

    `ignored` keys do not change the numbers of this library. `off` maps keys of unimplemented
    features to the values that mean "not used"; any other value is an error.
    """
    kinds = {f.name: f.type for f in fields(cls)}
    off = off or {}
    kept = {}
    for key, value in data.items():
        if key in kinds:
            if isinstance(value, str | list | dict) and not isinstance(value, kinds[key]):
                raise ValueError(f"{section}.{key} is {value!r}, expected {_named(kinds[key])}")
            kept[key] = value
        elif key in off:
            if value is not None and value not in off[key]:
                raise ValueError(
                    f"{section}.{key} is {value!r}, which is not supported; "
                    f"expected one of {off[key]}"
                )
        elif key != "_target_" and key not in ignored:
            raise ValueError(f"{section}.{key} is not a known option (its value is {value!r})")
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in kept:
            raise ValueError(f"{section}.{f.name} is missing")
    return cls(**kept)


def _named(kind) -> str:
    return getattr(kind, "__name__", str(kind))


def _count(section: str, num_classes, vocabulary) -> int:
    """Tokens without blank, from NeMo's `num_classes` (-1: the vocabulary's length)."""
    count = num_classes if num_classes and num_classes > 0 else len(vocabulary or ())
    require(count > 0, f"{section} names neither num_classes nor a vocabulary")
    return count


def _ctc_section(section: str, data: dict, d_encoder: int) -> CTCConfig:
    require(data.get("add_blank", True), f"{section}.add_blank: false is not supported")
    known = ("_target_", "feat_in", "num_classes", "vocabulary", "init_mode", "add_blank")
    for key in data:
        require(key in known, f"{section}.{key} is not a known option (its value is {data[key]!r})")
    return CTCConfig(
        vocab_size=_count(section, data.get("num_classes"), data.get("vocabulary")),
        d_in=data.get("feat_in") or d_encoder,
    )


def _joint_section(data: dict, d_encoder: int, decoder: dict) -> JointConfig:
    net = data.get("jointnet") or {}
    known = ("joint_hidden", "activation", "dropout", "encoder_hidden", "pred_hidden")
    for key, value in net.items():
        require(
            key in known or (key == "masking_prob" and (value or 0) <= 0),
            f"joint.jointnet.{key} is {value!r}, which is not supported",
        )
    ignored = [
        "_target_",
        "log_softmax",
        "preserve_memory",
        "fuse_loss_wer",
        "fused_batch_size",
        "experimental_fuse_loss_wer",
        "num_classes",
        "vocabulary",
        "jointnet",
        "num_extra_outputs",
        "experimental_pipeline",
    ]
    for key in data:
        require(key in ignored, f"joint.{key} is not a known option (its value is {data[key]!r})")
    kind = str(data.get("_target_", "RNNTJoint")).rpartition(".")[2]
    require(
        kind in ("RNNTJoint", "HATJoint"),
        f"joint._target_ {data['_target_']!r} is not supported, only RNNTJoint and HATJoint are",
    )
    require("joint_hidden" in net, "joint.jointnet.joint_hidden is missing")
    return JointConfig(
        vocab_size=_count("joint", data.get("num_classes"), data.get("vocabulary")),
        encoder_hidden=net.get("encoder_hidden") or d_encoder,
        pred_hidden=net.get("pred_hidden") or (decoder.get("prednet") or {}).get("pred_hidden"),
        joint_hidden=net["joint_hidden"],
        activation=str(net.get("activation", "relu")).lower(),
        dropout=net.get("dropout") or 0.0,
        n_durations=data.get("num_extra_outputs") or 0,
        hat=kind == "HATJoint",
    )


def _prediction_section(data: dict, vocab_size: int) -> PredictionConfig:
    net = data.get("prednet") or {}
    require("pred_hidden" in net, "decoder.prednet.pred_hidden is missing")
    kind = str(data.get("_target_", "RNNTDecoder")).rpartition(".")[2]
    require(
        kind in ("RNNTDecoder", "StatelessTransducerDecoder"),
        f"decoder._target_ {data.get('_target_')!r} is not supported, only RNNTDecoder and "
        "StatelessTransducerDecoder are",
    )
    stateless = kind == "StatelessTransducerDecoder"
    off = {"rnn_hidden_size": (-1, 0), "normalization_mode": ()}
    known = (
        "pred_hidden",
        "pred_rnn_layers",
        "dropout",
        "t_max",
        "forget_gate_bias",
        "weights_init_scale",
        "hidden_hidden_bias_scale",
    )
    for key, value in net.items():
        require(
            key in known or (key in off and (value is None or value in off[key])),
            f"decoder.prednet.{key} is {value!r}, which is not supported",
        )
    known = "_target_ prednet vocab_size blank_as_pad normalization_mode random_state_sampling"
    known += " context_size" * stateless
    for key in data:
        require(
            key in known.split(),
            f"decoder.{key} is not a known option (its value is {data[key]!r})",
        )
    norm = data.get("normalization_mode")
    require(
        norm is None or (stateless and norm == "layer"),
        f"decoder.normalization_mode {norm!r} is not supported",
    )
    # random_state_sampling: NeMo acts on it only while training
    size = data.get("vocab_size")
    require(
        not size or size < 0 or size == vocab_size,
        f"decoder.vocab_size is {size}, the joint has {vocab_size} tokens",
    )
    return PredictionConfig(
        vocab_size=vocab_size,
        pred_hidden=net["pred_hidden"],
        pred_rnn_layers=net.get("pred_rnn_layers", 1),
        dropout=net.get("dropout") or 0.0,
        blank_as_pad=stateless or data.get("blank_as_pad", True),
        context_size=data.get("context_size", 1) if stateless else None,
        normalized=norm is not None,
    )


def _aed_loss(cfg: dict) -> LossConfig:
    loss = cfg.get("loss") or {}
    off = {"predict_last_k": (0,), "per_token_reduction": (True,), "eps": (1e-6,)}
    for key, value in loss.items():
        require(
            key in ("_target_", "label_smoothing", "pad_id") or value in off.get(key, ()),
            f"loss.{key} is {value!r}, which is not supported",
        )
    return LossConfig(
        label_smoothing=float(loss.get("label_smoothing") or 0.0),
        mask_prompt=bool(cfg.get("use_loss_mask_for_prompt")),
    )


def _loss(cfg: dict, joint: JointConfig | None, ctc: CTCConfig | None) -> LossConfig:
    loss = cfg.get("loss") or {}
    name = loss.get("loss_name") or "default"
    aux = cfg.get("aux_ctc") or {}
    common = dict(
        rnnt_reduction=cfg.get("rnnt_reduction") or "mean_batch",
        ctc_reduction=(aux if joint else cfg).get("ctc_reduction") or "mean_batch",
        ctc_weight=1.0 if joint is None else (aux.get("ctc_loss_weight", 0.5) if ctc else 0.0),
    )
    if joint is None:
        return LossConfig(**common)
    if joint.n_durations == 0:
        require(
            name in ("default", "warprnnt", "warprnnt_numba", "pytorch", "rnnt_triton"),
            f"loss.loss_name is {name!r}, which is not supported for an RNNT joint",
        )
        kwargs = loss.get(f"{name}_kwargs") or loss.get("warprnnt_numba_kwargs") or {}
        durations = ()
    else:
        require(
            name in ("tdt", "tdt_pytorch", "default"),
            f"loss.loss_name is {name!r}, but the joint has {joint.n_durations} extra outputs; "
            "only TDT durations are supported",
        )
        kwargs = loss.get(f"{name}_kwargs") or loss.get("tdt_kwargs") or {}
        durations = (
            kwargs.get("durations")
            or (cfg.get("decoding") or {}).get("durations")
            or (cfg.get("model_defaults") or {}).get("tdt_durations")
        )
        require(bool(durations), "no TDT durations in loss.tdt_kwargs, decoding or model_defaults")
        require(
            len(durations) == joint.n_durations,
            f"{len(durations)} durations but joint.num_extra_outputs is {joint.n_durations}",
        )
    known = ("durations", "sigma", "omega", "fastemit_lambda", "clamp")
    for key in kwargs:
        require(key in known, f"loss.{name}_kwargs.{key} is not a known option")
    return LossConfig(
        durations=tuple(int(d) for d in durations),
        sigma=kwargs.get("sigma") or 0.0,
        omega=kwargs.get("omega") or 0.0,
        fastemit_lambda=kwargs.get("fastemit_lambda") or 0.0,
        clamp=kwargs.get("clamp", -1.0),
        **common,
    )

"""Fields of EncoderConfig that a family's config.json says in other words: read from all its keys, and written back."""

from .config import checked, shown


def _given(values, key, default, kind=int, limits=None):
    """The value of a key, which must fit as in `config.checked`; `default` where it is missing or null."""
    return default if values.get(key) is None else checked(key, values[key], kind, limits)


def read_distilbert(values):
    """transformers knows these by BERT's names too, and prefers them."""
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    return {name: values[name] for name in names if values.get(name) is not None}


def read_ernie(values):
    """The table of task types exists only where `use_task_id` says so."""
    types = _given(values, "task_type_vocab_size", 3, limits=(1, 2**31 - 1))
    return dict(task_type_vocab_size=types if _given(values, "use_task_id", False, bool) else 0)


def write_ernie(config):
    if not config.task_type_vocab_size:
        return dict(use_task_id=False)
    return dict(use_task_id=True, task_type_vocab_size=config.task_type_vocab_size)


def rotary(default_theta, default_layers):
    """read and write of a family whose layers all have the same rotary positions."""

    def read(values):
        layers = _given(values, "num_hidden_layers", default_layers, limits=(1, 1024))
        rope = _given(values, "rope_parameters", None, dict) or _given(values, "rope_scaling", {}, dict)
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = _given(values, "rope_theta", default_theta, float, (1, 1e12))
        theta = float(_given(rope, "rope_theta", theta, float, (1, 1e12)))
        factor = float(_given(rope, "factor", 1.0, float, (1e-3, 1e6))) if kind in ("linear", "ntk") else 1.0
        if kind == "ntk" and rope.get("mixed_b") is None:
            # of the published GTE directories: a larger base, and positions divided by a root
            head = _given(values, "hidden_size", 768) // _given(values, "num_attention_heads", 12, limits=(1, 2**20))
            # a size that no model has is refused later, by name
            theta, factor = theta * factor, factor ** (2 / max(head, 1))
        elif kind not in ("default", "linear"):
            raise ValueError(f"rope_parameters are {shown(rope)}: expected rope_type 'default' or 'linear'")
        return dict(windows=(None,) * layers, rope_thetas=(theta,) * layers, rope_factor=factor)

    def write(config):
        rope = dict(rope_type="default", rope_theta=config.rope_thetas[0])
        if config.rope_factor != 1.0:
            rope |= dict(rope_type="linear", factor=config.rope_factor)
        return dict(rope_parameters=rope)

    return dict(read=read, write=write)


def read_modernbert(values):
    """Windows and rotary bases of the layers, from current keys or those of the published checkpoints."""
    layers = _given(values, "num_hidden_layers", 22, limits=(1, 1024))
    every = _given(values, "global_attn_every_n_layers", 3, limits=(1, 1024))
    usual = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    kinds = _given(values, "layer_types", usual, list)
    ropes = _given(values, "rope_parameters", {}, dict)
    thetas = {}
    for kind, old, default in (
        ("full_attention", "global_rope_theta", 160000.0),
        ("sliding_attention", "local_rope_theta", 10000.0),
    ):
        rope = _given(ropes, kind, {}, dict)
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope_parameters of {kind} are {shown(rope)}: expected rope_type 'default'")
        thetas[kind] = _given(rope, "rope_theta", _given(values, old, default, float, (1, 1e12)), float, (1, 1e12))
    if len(kinds) != layers or not all(kind in [*thetas] for kind in kinds):
        raise ValueError(f"layer_types is {shown(kinds)}: expected {' or '.join(thetas)}, num_hidden_layers times")
    # transformers reads either, the second last
    window = _given(values, "local_attention", 128, limits=(0, 2**31 - 1)) // 2
    window = _given(values, "sliding_window", window, limits=(0, 2**30))
    return dict(
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        rope_thetas=tuple(thetas[kind] for kind in kinds),
    )


def write_modernbert(config):
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    thetas = {kind: dict(rope_type="default", rope_theta=theta) for kind, theta in zip(kinds, config.rope_thetas)}
    windows = [window for window in config.windows if window is not None]
    return dict(layer_types=kinds, rope_parameters=thetas, local_attention=2 * windows[0] if windows else 128)


def read_deberta(values):
    """The fields of both of DeBERTa's model types that BERT does not have."""
    is_packed = values.get("model_type") == "deberta"
    is_relative = _given(values, "relative_attention", False, bool)
    terms = values.get("pos_att_type") or ()
    terms = terms.lower().split("|") if isinstance(terms, str) else _given(values, "pos_att_type", [], list)
    terms = tuple(checked("pos_att_type", term, str).strip() for term in terms)
    if terms and not is_relative:
        raise ValueError(f"relative_attention is false: expected true with pos_att_type, which is {shown(terms)}")
    norms = _given(values, "norm_rel_ebd", "none", str).lower().split("|")
    positions = _given(values, "max_position_embeddings", 512)
    furthest = _given(values, "max_relative_positions", -1)
    return dict(
        attention="packed disentangled" if is_packed else "disentangled" if is_relative else "softmax",
        pos_att_type=terms,
        position_buckets=0 if is_packed else max(_given(values, "position_buckets", -1), 0),
        max_relative_positions=furthest if furthest > 0 else positions,
        norm_rel_ebd="layer_norm" in [norm.strip() for norm in norms],
        # our own key: transformers has no such decoder, and the published config.json do not mention it
        enhanced_mask_decoder=_given(values, "enhanced_mask_decoder", False, bool),
    )


def write_deberta(config):
    values = dict(
        relative_attention=bool(config.pos_att_type), pos_att_type=list(config.pos_att_type),
        max_relative_positions=config.max_relative_positions,
    )  # fmt: skip
    if config.enhanced_mask_decoder:
        values["enhanced_mask_decoder"] = True
    if config.model_type == "deberta-v2":
        values["position_buckets"] = config.position_buckets or -1
        values["norm_rel_ebd"] = "layer_norm" if config.norm_rel_ebd else "none"
    return values

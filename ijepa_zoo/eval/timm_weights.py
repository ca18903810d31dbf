"""timm's weights on the Hugging Face Hub: in reach or in the cache, or said at once to be neither.

timm itself asks the Hub for most of a minute before it gives up, and then does not say for what.
"""

from __future__ import annotations

from typing import Any

import timm

from ..errors import FetchError

_SECONDS = 5.0  # that the Hub may take to answer
_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm looks for them


def weights_within_reach(name: str) -> dict[str, Any]:
    """What timm's `create_model` must be told beside the name, so that it waits for no lost Hub.

    Args:
        name: A name of timm's with weights on the Hub; any other is left to timm.

    Returns:
        Nothing where the Hub answers; the file of the cache where it does not.

    Raises:
        FetchError: The Hub does not answer, or must not be asked, and the cache has no such file.
    """
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None or not cfg.hf_hub_id:
        return {}
    reason = _no_answer(cfg.hf_hub_id)
    if reason is None:
        return {}
    from huggingface_hub import try_to_load_from_cache

    for file in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _FILES:
        found = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(found, str):
            # NumPy's files of JAX models have a reader of their own, which takes no others
            overlay = {"file": found, "custom_load": found.endswith(".npz")}
            return {"pretrained_cfg_overlay": overlay}
    raise FetchError(
        f"the weights of {name!r} ('{cfg.hf_hub_id}') are not in the Hub's cache, and {reason}. "
        "Run once where there is a network and take the cache along (HF_HOME), with "
        "HF_HUB_OFFLINE=1 where there is none; or name a folder that timm has saved, "
        "timm:local-dir:FOLDER"
    )


def _no_answer(repository: str) -> str | None:
    """Why the Hub cannot be asked; None where it answers, whatever it says."""
    from huggingface_hub import constants, errors, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    transport: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of its HTTP client
    try:
        get_session().head(f"{constants.ENDPOINT}/{repository}", timeout=_SECONDS)
    except (transport, OSError) as error:
        why = str(error).strip() or type(error).__name__
        return f"{constants.ENDPOINT} cannot be reached ({why}): check the network and HF_ENDPOINT"
    return None

"""The window and the kept first tokens that ``triton_swa`` was given; they live on the config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .transformers_compat.config_values import layer_value

ATTRIBUTE = "hf_attn_swa"  # on the config, so that it is saved and loaded with the model


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class SwaSettings:
    """A query sees itself and the `window` - 1 keys before it, and each row's first `sinks` keys.

    ``window`` None: every layer keeps the window that the model's own config gives it.
    """

    window: int | None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and not _is_count(self.window, least=1):
            raise ValueError(
                f"window must be a whole number of tokens, 1 or more (it counts the query's own "
                f"token), got {self.window!r}"
            )
        if not _is_count(self.sinks, least=0):
            raise ValueError(
                f"sinks must be a whole number of tokens, 0 or more, got {self.sinks!r}"
            )

    def narrow(self, own: int | None) -> int | None:
        """The window of a layer whose own is `own` (None: sees everything)."""
        if self.window is None or own is None:
            return own if self.window is None else self.window
        return min(own, self.window)


OWN_WINDOWS = SwaSettings(window=None)


def store(config: Any, settings: SwaSettings) -> None:
    setattr(config, ATTRIBUTE, asdict(settings))


def stored(config: Any) -> SwaSettings | None:
    """What configure_swa left on a config, None if it never ran."""
    found = getattr(config, ATTRIBUTE, None)
    return None if found is None else SwaSettings(**found)


def required(config: Any) -> SwaSettings:
    """The settings that apply to a config: configured ones, else the model's own windows.

    Raises:
        ValueError: neither is there.
    """
    found = stored(config)
    if found is not None:
        return found
    if layer_value(config, "sliding_window") is None:
        raise ValueError(
            f"attn_implementation='triton_swa' needs a window, and a model of type "
            f"{getattr(config, 'model_type', '?')!r} has none in its config. Call "
            "hf_attn_patch.configure_swa(model, window=4096, sinks=4) first, or use 'triton_fa2' "
            "for full attention."
        )
    return OWN_WINDOWS

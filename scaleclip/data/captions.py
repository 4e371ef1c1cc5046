"""Which text of a sample is its caption."""

from collections.abc import Mapping, Sequence

from scaleclip.data.webdataset import SampleError


def choose_text(texts: Mapping[str, str], names: Sequence[str], draw: float) -> str:
    """One of the texts called `names`, uniformly by `draw` in [0, 1); missing and blank ones are left out of the draw.

    Raises:
        SampleError: all of them are missing or blank.
    """
    usable = [texts[name] for name in names if texts.get(name, "").strip()]
    if not usable:
        raise SampleError("empty_caption", f"none of the texts {', '.join(names)} is there")
    return usable[int(draw * len(usable))]

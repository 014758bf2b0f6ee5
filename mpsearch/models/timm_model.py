"""Networks of the package timm, by name."""

from __future__ import annotations

from torch import nn

from mpsearch.errors import InputError


def timm_model(model_name: str, pretrained: bool = True, **options: float | bool | None) -> nn.Module:
    """`timm.create_model` of a model in timm's own registry, in eval mode.

    timm also takes checkpoints, folders and repositories, which it may unpickle. These are not accepted here, because the
    arguments may come from somebody else's run folder.

    Parameters
    ----------
    model_name
        A name in timm's registry.
    pretrained
        Whether to load timm's weights.
    **options
        Numbers, such as `num_classes`.

    Raises
    ------
    InputError
        For other arguments, and where timm is not installed.
    """
    if not isinstance(model_name, str) or ":" in model_name or "/" in model_name:
        raise InputError(
            f"model.model_name must be a name in timm's registry, such as resnet18; got {model_name!r}. For a repository or a "
            "folder that you trust: model=custom model._target_=timm.create_model +model.model_name=NAME."
        )
    for name, value in options.items():
        if not isinstance(value, int | float | None):
            raise InputError(
                f"model.{name} must be a number, true, false or null; got {value!r}. For other arguments of timm: model=custom "
                "model._target_=timm.create_model."
            )
    try:
        import timm
    except ImportError:
        raise InputError("model=timm needs the package timm: pip install 'mpsearch[timm]'.") from None
    model: nn.Module = timm.create_model(model_name, pretrained=pretrained, **options)
    return model.eval()

"""The names of BiSeNet's weights in the official code, as rules for `revseg.models.official`.

There a layer is a module with a `conv` and a `bn`, here a row of modules; "arms" and "refines" are
the two halves of our refinements, the last of three heads is the main one.

Source: ycszen/TorchSeg, model/bisenet and furnace.
"""

from revseg.models.resnet import official_block_names


def _layer(theirs: str, ours: str, at: int = 0) -> dict[str, str]:
    """A convolution and its batch norm, in our row the modules `at` and at + 1."""
    return {
        rf"{theirs}\.conv\.(?P<tail>\w+)": rf"{ours}.{at}.\g<tail>",
        rf"{theirs}\.bn\.(?P<tail>\w+)": rf"{ours}.{at + 1}.\g<tail>",
    }


_PATHS = (
    _layer(r"spatial_path\.conv_7x7", "spatial.0")
    | _layer(r"spatial_path\.conv_3x3_1", "spatial.1")
    | _layer(r"spatial_path\.conv_3x3_2", "spatial.2")
    | _layer(r"spatial_path\.conv_1x1", "spatial.3")
    | _layer(r"global_context\.1", "context", 1)
    | _layer(r"arms\.(\d)\.conv_3x3", r"refinements.\1.conv")
    | _layer(r"arms\.(\d)\.channel_attention\.1", r"refinements.\1.attention", 1)
    | _layer(r"refines\.(\d)", r"refinements.\1.refine")
    | _layer(r"ffm\.conv_1x1", "fusion.conv")
    | {
        r"ffm\.channel_attention\.1\.conv\.(\w+)": r"fusion.attention.1.\1",
        r"ffm\.channel_attention\.2\.conv\.(\w+)": r"fusion.attention.3.\1",
        r"heads\.2\.conv_1x1\.(\w+)": r"head.1.\1",
        r"heads\.([01])\.conv_1x1\.(\w+)": r"aux.\1.1.\2",
    }
    | _layer(r"heads\.2\.conv_3x3", "head.0")
    | _layer(r"heads\.([01])\.conv_3x3", r"aux.\1.0")
)

OFFICIAL_RESNET18 = (
    {
        r"context_path\.conv1\.(\w+)": r"backbone.0.0.0.\1",
        r"context_path\.bn1\.(\w+)": r"backbone.0.0.1.\1",
    }
    | official_block_names(r"context_path\.layer([1-4])\.(\d+)", r"backbone.\1.\2")
    | _PATHS
)

_XCEPTION_LAYER = r"context_path\.layer([1-3])\.(\d+)"

OFFICIAL_XCEPTION39 = (
    _layer(r"context_path\.conv1", "backbone.0.0")
    | {
        rf"{_XCEPTION_LAYER}\.residual_branch\.(\d)\.conv1\.(\w+)": r"backbone.\1.\2.body.\3.0.\4",
        rf"{_XCEPTION_LAYER}\.proj\.conv1\.(\w+)": r"backbone.\1.\2.shortcut.0.\3",
    }
    | _layer(rf"{_XCEPTION_LAYER}\.residual_branch\.(\d)\.point_wise_cbr", r"backbone.\1.\2.body.\3", 1)
    | _layer(rf"{_XCEPTION_LAYER}\.proj\.point_wise_cbr", r"backbone.\1.\2.shortcut", 1)
    | _PATHS
)

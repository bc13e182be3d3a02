"""The one table of the project's README: memory, time, gradients and trust of the ways to train whole networks."""

from benchmarks.record import Result, Results, Row
from benchmarks.tables import NOT_RUN, markdown, size

NETWORKS = {"vnet": "VNet", "unet": "U-Net", "resnet50_fcn": "ResNet50-FCN"}
WAYS = {  # of whole networks, what the table calls each, and which way of the scenarios it is
    "plain": ("plain PyTorch", None),
    "compile": ("torch.compile", "compile"),
    "checkpoint": ("torch.utils.checkpoint", "checkpoint"),
    "revseg fit": ("`revseg.fit`", "revseg"),
    "revseg fit bands": ("`revseg.fit`, `bands=True`", "revseg"),
    "revseg lowest": ('`memory="lowest"`', "revseg"),
}
OWN = ("revseg lowest", "vnet")  # the level is of networks of ours


def first_table(results: Results) -> list[str]:
    """The table, and a sentence about VNet.

    Returns:
        Nothing where one of the questions was not measured.
    """
    networks, correctness = results.get("whole_networks"), results.get("correctness")
    if networks is None or correctness is None:
        return []
    rows = {(row["network"], row["way"]): row for row in networks["rows"]}
    shapes = [
        f"{title}, {size([rows[name, 'plain']['images'], *networks['settings']['size']])}"
        for name, title in NETWORKS.items()
        if (name, "plain") in rows
    ]
    lines = []
    for way, (title, scenarios) in WAYS.items():
        cells = [
            "" if way == OWN[0] and name != OWN[1] else _cell(rows.get((name, way)))
            for name in NETWORKS
            if (name, "plain") in rows
        ]
        lines.append([title, *cells, _wrong(correctness, scenarios)])
    return [markdown((["", *shapes, "silently wrong"], lines)), *_vnet(results)]


def _cell(row: Row | None) -> str:
    """Peak, time and error."""
    if row is None or "peak_mib" not in row:
        return NOT_RUN
    ratio = 1.0 if row["way"] == "plain" else row["ratio"]["median"]
    return f"{row['peak_mib']:,.0f} MiB, {ratio:.2f}, {row['gradient_error']:.1e}"


def _wrong(correctness: Result, way: str | None) -> str:
    """How many scenarios the way gets wrong without a word."""
    if way is None:
        return "the reference"
    verdicts = [row["verdict"] for row in correctness["rows"] if row["way"] == way]
    wrong = sum(each in ("wrong", "crash") for each in verdicts)
    return f"{wrong} of {len(verdicts)}" if verdicts else NOT_RUN


def _vnet(results: Results) -> list[str]:
    levels = results.get("memory_levels")
    if levels is None:
        return []
    images, height, width = levels["settings"]["size"]
    rows = {row["case"]: row for row in levels["rows"]}
    plain, lowest = rows["plain"]["peak_mib"], rows["lowest"]["peak_mib"]
    text = (
        f"VNet on {images} images of {height} x {width} takes {plain:,.0f} MiB in plain "
        f'PyTorch and {lowest:,.0f} MiB with `memory="lowest"`, in {rows["lowest"]["ratio"]["median"]:.2f} of the '
        f"time (timed on {size(levels['settings']['time_size'])}). Measured on a CPU; how, and all else: "
        "[benchmarks](benchmarks/README.md).\n"
    )
    return [text]

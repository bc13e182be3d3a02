"""The one table of the project's README: memory, time, gradients and trust of the ways to train whole networks."""

from benchmarks.record import Result, Results, Row
from benchmarks.tables import NOT_RUN, markdown, size

NETWORKS = {"vnet": "VNet", "unet": "U-Net", "resnet50_fcn": "ResNet50-FCN"}
WAYS = ("plain", "compile", "checkpoint", "revseg")
OURS = {"vnet": "revseg lowest"}  # of networks without a level of their own a plan


def first_table(results: Results) -> list[str]:
    """The table, and a sentence about VNet.

    Returns:
        Nothing where one of the questions was not measured.
    """
    networks, correctness = results.get("whole_networks"), results.get("correctness")
    if networks is None or correctness is None:
        return []
    rows = {(row["network"], row["way"]): row for row in networks["rows"]}
    lines = []
    for name, title in NETWORKS.items():
        images = rows[name, "plain"]["images"]
        shape = size([images, *networks["settings"]["size"]])
        ours = OURS.get(name, "revseg fit")
        ways = [way if way != "revseg" else ours for way in WAYS]
        lines.append([f"{title}, {shape}", *(_cell(rows.get((name, way))) for way in ways)])
    lines.append(["silently wrong", "the reference", *(_wrong(correctness, way) for way in WAYS[1:])])
    head = ["peak MiB; time; gradient error", *WAYS]
    return [markdown((head, lines)), *_vnet(results)]


def _cell(row: Row | None) -> str:
    if row is None or "peak_mib" not in row:
        return NOT_RUN
    ratio = 1.0 if row["way"] == "plain" else row["ratio"]["median"]
    return f"{row['peak_mib']:,.0f}; {ratio:.2f}; {row['gradient_error']:.0e}"


def _wrong(correctness: Result, way: str) -> str:
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
        f"A whole network: a step of VNet on {images} images of {height} x {width} takes {plain:,.0f} MiB in plain "
        f'PyTorch and {lowest:,.0f} MiB with `memory="lowest"`, in {rows["lowest"]["ratio"]["median"]:.2f} of the '
        f"time (timed at {size(levels['settings']['time_size'][1:])}). Measured on a CPU; how, and all else: "
        "[benchmarks](benchmarks/README.md).\n"
    )
    return [text]

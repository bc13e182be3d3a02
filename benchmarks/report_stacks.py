"""The section of `benchmarks/README.md` on stacks, from `results/stacks.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

HEAD = """\
## Stacks

The same modules as `revseg.stack.Stack` instead of `nn.Sequential`: batch norm and activation go over a map
block by block, one raw map a layer is kept, and statistics are not computed again in the second run. Ratio of
the time of a step to ordinary autograd with `nn.Sequential`, on a heap that keeps its pages: median, quartiles
in brackets; then the peak in MiB. "plain Stack" stores its activations: the fair rival of "revseg Stack".
"""


def table(result: Result) -> Table:
    """Ways down; depths and threads across."""
    rows = result["rows"]
    cases = list(dict.fromkeys((row["depth"], row["threads"]) for row in rows))
    cells = {(row["way"], row["depth"], row["threads"]): row for row in rows}
    head = ["", *(f"depth {depth}, {threads} thread{'s' * (threads > 1)}" for depth, threads in cases)]
    plain = [f"1, {next(r for r in rows if r['depth'] == depth)['plain_mib']:,.0f} MiB" for depth, _ in cases]
    body = [
        [way, *(_cell(cells[(way, *case)]) for case in cases)]
        for way in dict.fromkeys(row["way"] for row in rows)
    ]
    return head, [["plain", *plain], *body]


def _cell(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), {row['peak_mib']:,.0f} MiB"

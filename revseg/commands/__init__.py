"""The commands of the command line, one file each, and the table of them."""

from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """What a command is told, a dataclass, and the function that takes it, both as "module:name"."""

    settings: str
    function: str


COMMANDS: dict[str, Command] = {  # one word or two
    "train": Command("revseg.training.settings:TrainSettings", "revseg.commands.train:train"),
    "evaluate": Command("revseg.inference.settings:EvaluateSettings", "revseg.commands.evaluate:evaluate"),
    "predict": Command("revseg.inference.settings:PredictSettings", "revseg.commands.predict:predict"),
    "export": Command("revseg.inference.settings:ExportSettings", "revseg.commands.export:export"),
    "benchmark": Command(
        "revseg.inference.settings:BenchmarkSettings", "revseg.commands.benchmark:benchmark"
    ),
    "data check": Command("revseg.commands.data:CheckSettings", "revseg.commands.data:check"),
    "data show": Command("revseg.commands.data:ShowSettings", "revseg.commands.data:show"),
    "data cache": Command("revseg.commands.data:CacheSettings", "revseg.commands.data:cache"),
    "data synthesize": Command("revseg.commands.data:SynthesizeSettings", "revseg.commands.data:synthesize"),
    "plan": Command("revseg.commands.plan:PlanSettings", "revseg.commands.plan:plan"),
    "memory": Command("revseg.commands.memory:MemorySettings", "revseg.commands.memory:memory"),
    "doctor": Command("revseg.training.settings:DoctorSettings", "revseg.commands.doctor:doctor"),
    "completion": Command(
        "revseg.commands.completion:CompletionSettings", "revseg.commands.completion:completion"
    ),
}


def named(place: str) -> Any:
    """The thing that "module:name" names, as a `Command` has them."""
    module, name = place.split(":")
    return getattr(import_module(module), name)

"""Empty memory is NaN during tests, so that reading before writing shows."""

import gc
import os
import signal
import sys
from collections import defaultdict
from importlib.util import find_spec

# Before torch is loaded: threads that wait for each other sleep, here and in the processes of tests. When
# they spin on processors that others use too, a test of two threads takes minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from revseg.kernels.cpu import compiled

if find_spec("hypothesis"):  # a machine with a GPU, where nothing can be installed, may lack it
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "revseg",
        deadline=None,
        derandomize=True,  # a red run stays red
        phases=(Phase.explicit, Phase.generate),  # shrinking networks takes minutes and helps little
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("revseg")
torch.set_num_threads(1)  # tests run in several processes; threads that wait for each other cost minutes
# As a terminal has them: what a shell starts in the background ignores SIGINT, and under nohup SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_deterministic_debug_mode("warn")  # which loads no compiler
torch.utils.deterministic.fill_uninitialized_memory = True

_loaded = 0  # modules


def pytest_addoption(parser):
    parser.addoption(
        "--cases", type=int, metavar="K", help="of each test run at most K of its cases, spread over all"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves cases out if `--cases` says so, and skips tests marked `needs_cuda` without a GPU."""
    if most := config.getoption("cases"):
        tests = defaultdict(list)
        for case in items:
            tests[_function(case)].append(case)
        kept = {case for cases in tests.values() for case in cases[:: -(-len(cases) // most)]}
        config.hook.pytest_deselected(items=[case for case in items if case not in kept])
        items[:] = [case for case in items if case in kept]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("needs_cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _function(item):
    """The name of a test without that of its case."""
    return item.nodeid.split("[")[0]


@pytest.fixture(scope="module", autouse=True)
def _objects_of_other_tests_are_left_alone():
    """Counting memory collects garbage; going through all that the tests of a process have loaded took seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _objects_of_packages_are_left_alone():
    """Nor through those of packages that a test of this file has loaded, such as torch's compiler."""
    global _loaded
    if len(sys.modules) > _loaded + 100:
        _loaded = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def passes(request, monkeypatch):
    """How maps are gone through: "whole", as small ones are; "blocks" or "compiled", small ones too, and of every dtype."""
    if request.param == "whole":
        yield
        return
    monkeypatch.setattr(compiled, "LEAST", 1)
    if request.param == "blocks":
        monkeypatch.setenv("REVSEG_COMPILE", "0")
        yield
        return
    if not compiled._has_compiler():
        pytest.skip("no C++ compiler")
    import torch._dynamo  # takes seconds, and most tests need it not

    monkeypatch.setattr(compiled, "KINDS", 100)
    with torch._dynamo.config.patch(recompile_limit=100):
        yield
    assert all(compiled._kinds.values())


@pytest.fixture
def runs(monkeypatch):
    """How many layers each run of a stack had, so that no test compares the plain path with itself."""
    from revseg.layers import stack

    seen, run = [], stack.run_layers

    def counted(layers, x):
        seen.append(len(layers))
        return run(layers, x)

    monkeypatch.setattr(stack, "run_layers", counted)
    return seen

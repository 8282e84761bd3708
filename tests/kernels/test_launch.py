"""Launch settings: the default, a measured profile of the device, and the search that makes one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calls import CALLS
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import GridExecutor

from fastbert.kernels import _launch

ROOT = Path(__file__).resolve().parents[2]
DEFAULT, FAST, SLOW, HUGE = ({"BLOCK": block, "num_warps": 4} for block in (64, 128, 32, 1024))


class Kernel:
    """Stands for the `run` of a launcher: records its settings, and refuses those that do not fit the device."""

    def __init__(self, candidates=(FAST, SLOW, HUGE), key="bf16 D768"):
        self.tried, self.ran, self.candidates, self.key = [], [], candidates, key

    def run(self, settings):
        self.tried.append(settings)
        if settings == HUGE:
            raise OutOfResources(10**6, 232448, "shared memory")
        self.ran.append(settings)

    def launch(self):
        """The settings of the launch itself, the last to run."""
        _launch.launch(self.run, "toy_fwd", self.key, DEFAULT, self.candidates)
        return self.ran[-1]


@pytest.fixture(autouse=True)
def device_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(_launch, "PROFILES", tmp_path)
    monkeypatch.setattr(_launch, "AUTOTUNE", False)
    monkeypatch.setattr(_launch, "device_name", lambda: "toy_9000")
    monkeypatch.setattr(_launch, "timings", {})
    _launch.profile_of.cache_clear()
    yield
    _launch.profile_of.cache_clear()


@pytest.fixture
def profile(tmp_path):
    def write(settings, device="toy_9000"):
        content = {"settings": {"toy_fwd": {"bf16 D768": settings}}}
        (tmp_path / f"{device}.json").write_text(json.dumps(content), encoding="utf-8")

    return write


@pytest.fixture
def search(monkeypatch):
    """FASTBERT_AUTOTUNE=1 with a clock that says how long each setting takes, in order: default, candidates."""

    def switch_on(*times):
        clock = iter(times)

        def microseconds(call):
            call()
            return next(clock)

        monkeypatch.setattr(_launch, "AUTOTUNE", True)
        monkeypatch.setattr(_launch, "microseconds", microseconds)

    return switch_on


def test_a_device_without_a_profile_takes_the_default():
    kernel = Kernel()
    assert kernel.launch() == DEFAULT
    assert kernel.ran == [DEFAULT]  # nothing else ran: no search without the switch
    assert _launch.measured() == {} == _launch.timings


def test_a_profile_is_used(profile):
    profile(FAST)
    kernel = Kernel()
    assert kernel.launch() == kernel.launch() == FAST
    assert _launch.measured() == {"toy_fwd": {"bf16 D768": FAST}}


def test_a_profile_belongs_to_its_device_and_its_class_of_shapes(profile, monkeypatch):
    profile(FAST)
    assert Kernel(key="bf16 D1024").launch() == DEFAULT
    monkeypatch.setattr(_launch, "device_name", lambda: "toy_9001")
    assert Kernel().launch() == DEFAULT


def test_settings_that_the_kernel_no_longer_offers_are_not_used(profile):
    profile({"BLOCK": 128, "GONE": 4})
    assert Kernel().launch() == DEFAULT


def test_settings_that_no_longer_fit_are_not_used(profile):
    profile(HUGE)
    kernel = Kernel()
    assert kernel.launch() == kernel.launch() == DEFAULT
    assert kernel.tried == [HUGE, DEFAULT, DEFAULT]  # not tried again


def test_the_search_finds_the_fastest_once(search):
    search(10.0, 5.0, 20.0)
    kernel = Kernel()
    assert kernel.launch() == FAST
    # all but the one that does not fit, then the launch itself
    assert kernel.ran == [DEFAULT, FAST, SLOW, FAST]
    assert kernel.launch() == FAST
    assert len(kernel.ran) == 5
    assert _launch.timings == {"toy_fwd": {"bf16 D768": [(DEFAULT, 10.0), (FAST, 5.0), (SLOW, 20.0), (HUGE, None)]}}


def test_a_difference_within_the_noise_keeps_the_default(search):
    search(10.0, 9.9, 9.8)
    assert Kernel().launch() == DEFAULT


def test_a_default_that_does_not_fit_is_passed_over_in_the_search(search):
    search(7.0)
    kernel = Kernel([FAST])
    _launch.launch(kernel.run, "toy_fwd", kernel.key, HUGE, kernel.candidates)
    assert kernel.ran == [FAST, FAST]


def test_the_search_leaves_alone_what_a_profile_holds(search, profile):
    search()
    profile(SLOW)
    kernel = Kernel()
    assert kernel.launch() == SLOW
    assert kernel.ran == [SLOW]


def test_a_kernel_without_candidates_is_not_searched(search):
    search()
    kernel = Kernel(candidates=())
    assert kernel.launch() == DEFAULT
    assert _launch.timings == {}


def test_a_kernel_that_works_in_place_runs_once_on_its_input(search, device):
    search(3.0, 1.0, 2.0)
    x = torch.arange(5.0, device=device)

    def double(settings):
        x.mul_(2)

    _launch.launch(double, "toy_bwd", "fp32", DEFAULT, [FAST, SLOW], overwrites=[x])
    assert x.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_other_errors_are_raised(search):
    search(1.0)

    def broken(settings):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        _launch.launch(broken, "toy_fwd", "fp32", DEFAULT, [FAST])


def test_names_of_devices(monkeypatch):
    monkeypatch.undo()  # the fixture's name
    monkeypatch.setattr(torch.cuda, "get_device_name", {0: "NVIDIA H200", 1: "NVIDIA A100-SXM4-80GB"}.get)
    _launch.device_name_of.cache_clear()
    assert (_launch.device_name_of(0), _launch.device_name_of(1)) == ("nvidia_h200", "nvidia_a100-sxm4-80gb")
    _launch.device_name_of.cache_clear()
    if not torch.cuda.is_available():
        assert _launch.device_name() == "interpreter"


def test_shipped_profiles_are_readable():
    for file in (ROOT / "kernels" / "profiles").glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"device", "torch", "triton", "date", "settings", "microseconds"} <= content.keys(), file
        assert re.sub(r"[ /]", "_", content["device"].lower()) == file.stem
        for kernel, classes in content["settings"].items():
            for key, settings in classes.items():
                assert settings and all(type(value) in (int, bool) for value in settings.values()), (kernel, key)
                chosen, default = content["microseconds"][kernel][key]
                assert chosen < default


@pytest.mark.parametrize(("arch", "counts_as"), [(80, 80), (89, 89), (90, 90), (100, 100), (120, 89), ("gfx942", 0)])
def test_rtx_cards_take_the_settings_of_ada(monkeypatch, arch, counts_as):
    """A number above 100 does not make a card a larger one: 120 has 99 KiB of shared memory."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=arch)))
    monkeypatch.setattr(_launch, "driver", driver)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    assert _launch.capability() == counts_as


SWITCHES = {"allow_tf32": {False: "ieee", True: "tf32"}, "fp32_precision": {"ieee": "ieee", "tf32": "tf32"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what Triton's interpreter is called with")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("switch", [name for name in SWITCHES if hasattr(torch.backends.cuda.matmul, name)])
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("attention", torch.bfloat16),
        *((name, torch.float32) for name in ("attention", "attention-tiled", "disentangled_attention")),
    ],
    ids=str,
)
def test_products_of_fp32_follow_either_switch_of_torch(name, switch, dtype, monkeypatch):
    """In every kernel. torch raises where allow_tf32 is read after fp32_precision was set."""
    matmul, seen, run = torch.backends.cuda.matmul, set(), GridExecutor.__call__

    def look(self, *args, **kwargs):
        seen.update({kwargs["PRECISION"]} if "PRECISION" in kwargs else ())
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", look)
    call = CALLS[name]
    before = getattr(matmul, switch)
    try:
        for value, precision in SWITCHES[switch].items():
            setattr(matmul, switch, value)
            seen.clear()
            call.run(call.arguments("cpu", dtype))
            assert seen == {precision if dtype == torch.float32 else "ieee"}
    finally:
        setattr(matmul, switch, before)

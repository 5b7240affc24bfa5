"""The predictor: probabilities, threads, precision, memory, cores and compilation."""

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import inkdask.predictor
from inkdask.errors import InkdaskError
from inkdask.models import compiling, fast, forms, hardware, weights
from inkdask.models.fast import is_prepared, prepare
from inkdask.models.forms import Form
from inkdask.models.networks import BUILDERS
from inkdask.models.streams import CpuStream
from inkdask.predictor import AHEAD, Predictor, predictor
from inkdask.specs import ModelSpec, Network
from tests.test_runs import wait_until

LAYERS, TILE, K = 3, 16, 4
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def network(function=None, **values):
    model = ModelSpec("toy", "ink_toy", "nowhere", LAYERS, TILE)
    spec = {"clip": 200.0, "divisor": 100.0, "digest": "0", "function": function, **values}
    return Network(model, LAYERS, TILE, K, **spec)


def pool(x):
    """Logits that depend on every voxel of a tile: (b, 1, z, t, t) to (b, 1, k, k)."""
    depth = torch.arange(1, x.shape[2] + 1, dtype=x.dtype, device=x.device)
    x = (x[:, 0] * depth[:, None, None]).mean(1, keepdim=True)
    return nn.functional.avg_pool2d(x, TILE // K) - 1


class Patches(nn.Module):
    """A network without convolutions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(LAYERS * (TILE // K) ** 2, 1)

    def forward(self, x):
        step = TILE // K
        patches = x[:, 0].unfold(2, step, step).unfold(3, step, step)  # (b, z, k, k, s, s)
        return self.linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3)).permute(0, 3, 1, 2)


class Toy(nn.Module):
    """A network with weights, the same at any batch size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 8, (LAYERS, 4, 4), stride=4, bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.mix = nn.Conv2d(8, 1, 1)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        return self.mix(self.norm(self.conv(x)).relu()[:, :, 0])


@pytest.fixture
def block():
    return np.random.default_rng(0).integers(0, 256, (LAYERS, 40, 50), dtype=np.uint8)


@pytest.fixture
def origins():
    ys, xs = np.meshgrid([0, 5, 24], [0, 16, 33, 34], indexing="ij")
    return np.stack([ys.ravel(), xs.ravel()], axis=1)


@pytest.fixture
def toy(monkeypatch):
    """Let the spec's weights be those of a new toy network, and return it."""
    torch.manual_seed(0)
    module = Toy().eval().requires_grad_(False)
    monkeypatch.setattr(weights, "load", lambda network: module)
    return module


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(inkdask.predictor, "_predictors", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def by_hand(forward, block, origins, clip=200.0, divisor=100.0):
    """Every tile on its own, cut and normalised with NumPy."""
    out = []
    for y, x in origins:
        tile = np.minimum(block[:, y : y + TILE, x : x + TILE].astype(np.float32), clip) / divisor
        with torch.no_grad():
            out.append(torch.sigmoid(forward(torch.from_numpy(tile)[None, None]))[0, 0].numpy())
    return np.stack(out)


# Probabilities.


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_probabilities_are_those_of_single_tiles(block, origins, batch_size):
    got = Predictor(network(pool, batch_size=batch_size)).predict(block, origins)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, by_hand(pool, block, origins), atol=1e-6)
    assert got.std() > 0.01


@pytest.mark.parametrize(("clip", "divisor"), [(200.0, 200.0), (255.0, 255.0), (90.5, 40.0)])
def test_voxels_are_clipped_and_divided(block, origins, clip, divisor):
    got = Predictor(network(pool, clip=clip, divisor=divisor)).predict(block, origins)
    np.testing.assert_allclose(got, by_hand(pool, block, origins, clip, divisor), atol=1e-6)


def test_callable_may_return_numpy(block, origins):
    got = Predictor(network(lambda x: pool(x).numpy().astype(np.float64))).predict(block, origins)
    np.testing.assert_allclose(got, by_hand(pool, block, origins), atol=1e-6)


def test_callable_gets_float32_batches_without_padding(block, origins):
    seen = []

    def record(x):
        seen.append((x.dtype, tuple(x.shape)))
        return pool(x)

    Predictor(network(record, batch_size=5, precision="bfloat16")).predict(block, origins)
    shape = (1, LAYERS, TILE, TILE)
    assert seen == [(torch.float32, (n, *shape)) for n in (5, 5, 2)]


def test_block_without_tiles_does_not_run_the_network(block):
    def never(x):
        raise AssertionError

    got = Predictor(network(never)).predict(block, np.empty((0, 2), int))
    assert got.shape == (0, K, K)
    assert got.dtype == np.float32


def test_block_may_be_strided_and_read_only(block, origins):
    expected = by_hand(pool, block, origins)
    padded = np.zeros((LAYERS, 50, 60), np.uint8)
    padded[:, 5:45, 5:55] = block
    view = padded[:, 5:45, 5:55]
    view.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = Predictor(network(pool)).predict(view, origins.astype(np.uint16))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_wrong_number_of_layers_is_reported_with_both(block, origins):
    with pytest.raises(InkdaskError, match="2 layers and the network of 'toy' reads 3"):
        Predictor(network(pool)).predict(block[:2], origins)


def test_wrong_shape_of_logits_is_reported(block, origins):
    with pytest.raises(InkdaskError, match=r"shape \(4, 1, 2, 2\) for 4 tiles, not \(4, 1, 4, 4\)"):
        Predictor(network(lambda x: pool(x)[:, :, ::2, ::2], batch_size=4)).predict(block, origins)


def test_error_of_a_callable_is_raised(block, origins):
    def broken(x):
        raise ZeroDivisionError("in the callable")

    with pytest.raises(ZeroDivisionError, match="in the callable"):
        Predictor(network(broken)).predict(block, origins)


@pytest.mark.parametrize("batch_size", [1, 6, 7, 256])
def test_gpu_batches_have_few_sizes_and_waste_less_than_half(batch_size):
    ours = Predictor(network(batch_size=batch_size, precision="float32"))
    ours._form = Form("plain", "float32", pool, forms.gather)
    assert not ours._pads  # on a CPU
    assert all(ours._way(b)[1] == b for b in range(1, batch_size + 1))
    ours._pads = True
    sizes = {b: ours._way(b)[1] for b in range(1, batch_size + 1)}
    assert all(b <= size < 2 * b for b, size in sizes.items())
    assert len(set(sizes.values())) <= np.log2(batch_size) + 1


# One network a process, one thread a network.


def test_process_has_one_predictor_of_a_network():
    spec = network(precision="float32")
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: predictor(pickle.loads(pickle.dumps(spec))), range(32)))
    assert len(found) == 1
    assert predictor(network(precision="bfloat16")) not in found


def test_copies_of_a_callable_share_a_predictor_by_digest():
    first = predictor(network(lambda x: pool(x), digest="a"))
    assert predictor(network(lambda x: pool(x), digest="a")) is first
    assert predictor(network(lambda x: pool(x), digest="b")) is not first


def test_forward_passes_run_in_one_thread(block, origins):
    names, running = set(), []

    def record(x):
        running.append(1)
        assert len(running) == 1, "two forward passes at once"
        names.add(threading.current_thread().name)
        running.pop()
        return pool(x)

    ours = Predictor(network(record, batch_size=2))
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: ours.predict(block, origins), range(8)))
    assert len(names) == 1
    assert names.pop().startswith("inkdask-predictor")
    assert all(np.array_equal(result, results[0]) for result in results)


def test_weights_are_loaded_once(block, origins, monkeypatch):
    loads = []

    def load(network):
        loads.append(network)
        return Toy().eval()

    monkeypatch.setattr(weights, "load", load)
    spec = network()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: predictor(spec).predict(block, origins), range(8)))
    assert loads == [spec]


# Precision, devices, cores.


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_precision_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(hardware, "has_amx", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert Predictor(network()).precision == expected
    for precision in ("float32", "bfloat16"):
        assert Predictor(network(precision=precision)).precision == precision
    assert Predictor(network(pool)).precision == ""


def test_precision_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(inkdask.predictor, "device_for", lambda network: torch.device("cuda"))
    monkeypatch.setattr(inkdask.predictor, "CudaStream", lambda device: CpuStream())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InkdaskError, match=r"bfloat16 needs a GPU .*, and Tesla T4 is older"):
        Predictor(network(precision="bfloat16"))
    assert Predictor(network()).precision == "float32"


def test_batch_size_fits_the_device_unless_given(monkeypatch):
    def size(layers, tile, **values):
        return Predictor(Network(network().model, layers, tile, 4, 1, 1, "0", **values)).batch_size

    monkeypatch.setattr(inkdask.predictor, "device_for", lambda network: torch.device("cpu"))
    monkeypatch.setattr(inkdask.predictor, "cores", lambda: 3)
    assert size(26, 64) == 24
    assert size(62, 256) == 1
    assert size(26, 64, batch_size=7) == 7
    monkeypatch.setattr(inkdask.predictor, "device_for", lambda network: torch.device("cuda"))
    monkeypatch.setattr(inkdask.predictor, "CudaStream", lambda device: CpuStream())
    assert size(26, 64, precision="float32") == 256
    assert size(62, 256, precision="float32") == 6


def test_cores_of_a_process_come_from_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert hardware.cores() == 3
    for value in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert hardware.cores() == hardware.CPU_COUNT
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert hardware.cores() == hardware.CPU_COUNT


def test_cores_of_a_dask_worker_are_its_threads(monkeypatch):
    import distributed

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Dask's nanny sets it
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert client.submit(hardware.cores).result() == 3


def test_torch_uses_the_cores_of_the_worker(block, origins, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(inkdask.predictor, "cores", lambda: 2)

    def record(x):
        seen.append(torch.get_num_threads())
        return pool(x)

    try:
        Predictor(network(record)).predict(block, origins)
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


# The fast path and the plain one.


@pytest.mark.parametrize(("precision", "worst"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_fast_path_agrees_with_the_plain_network(block, origins, toy, precision, worst):
    expected = by_hand(toy, block, origins)
    ours = Predictor(network(precision=precision))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ours.predict(block, origins)
    assert isinstance(toy.norm, nn.Identity)  # folded
    assert ours._form.dtype is toy.conv.weight.dtype is getattr(torch, precision)
    assert ours.runs == f"CPU, {precision}, plain, batches of {ours.batch_size}"
    assert np.abs(got - expected).max() < worst


def test_wrong_fast_path_gives_way_with_one_warning(block, origins, monkeypatch):
    class WrongInBfloat16(Toy):
        def forward(self, x):
            return super().forward(x) + (3 if x.dtype is torch.bfloat16 else 0)

    torch.manual_seed(0)
    module = WrongInBfloat16().eval()
    expected = by_hand(module, block, origins)
    monkeypatch.setattr(weights, "load", lambda network: copy.deepcopy(module))
    ours = Predictor(network(precision="bfloat16"))
    with pytest.warns(RuntimeWarning, match=r"fast path of 'toy' .*bfloat16 on cpu") as caught:
        got = [ours.predict(block, origins) for _ in range(2)]
    assert [it.category for it in caught].count(RuntimeWarning) == 1
    assert (ours.precision, ours._form.name) == ("float32", "float32")
    np.testing.assert_allclose(got, [expected] * 2, atol=1e-6)


def test_failing_form_gives_way_to_the_next(block, origins, monkeypatch):
    """Kernels that cannot be built, or an operator that refuses its input."""
    torch.manual_seed(0)
    module = Toy().eval().requires_grad_(False)
    expected = by_hand(module, block, origins)
    monkeypatch.setattr(weights, "load", lambda network: copy.deepcopy(module))
    known = forms._forms

    def fail(module):
        prepare(module, torch.bfloat16)  # a form may have rewritten the network when it fails
        raise RuntimeError("no valid execution plans built.\nMore lines")

    def with_kernels(*args):
        yield "kernels", fail, None
        yield from known(*args)

    monkeypatch.setattr(forms, "_forms", with_kernels)
    ours = Predictor(network(precision="float32"))
    said = r"\(kernels, float32 on cpu\) failed \(RuntimeError: no valid execution plans built\.\);"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        got = ours.predict(block, origins)
    assert [it.category for it in caught].count(RuntimeWarning) == 1
    assert ours._form.name == "plain"
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_agree_is_false_for_nan():
    logits = torch.ones(2)
    assert fast.agree(logits, logits, 0.0)
    assert not fast.agree(logits * torch.nan, logits, 1.0)


def test_prepare_keeps_buffers_and_norms_in_float32():
    module = nn.Sequential(nn.BatchNorm3d(1), nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)).eval()
    module.register_buffer("frequencies", torch.rand(3))
    assert not is_prepared(module, torch.bfloat16)
    prepare(module, torch.bfloat16)
    assert isinstance(module[2], nn.Identity)
    assert module[1].weight.dtype is torch.bfloat16
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert module[0].weight.dtype is module.frequencies.dtype is torch.float32
    assert module(torch.rand(1, 1, 3, 3, 3).bfloat16()).dtype is torch.bfloat16


def test_is_prepared_tells_what_prepare_would_change():
    linear = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert is_prepared(linear, torch.float32)
    assert not is_prepared(linear, torch.bfloat16)
    assert not is_prepared(Toy(), torch.float32)


# Memory.


LACK = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee ...")


def out_of_memory_beyond(limit, calls, error=LACK):
    def function(x):
        calls.append(len(x))
        if len(x) > limit:
            raise error
        return pool(x)

    return function


@pytest.mark.parametrize(
    "error",
    [
        LACK,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
    ],
)
def test_lack_of_memory_halves_the_batch_for_good(block, origins, error):
    calls = []
    ours = Predictor(network(out_of_memory_beyond(3, calls, error), batch_size=11))
    expected = by_hand(pool, block, origins)
    np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-6)
    assert calls == [11, 6, 3, 3, 3, 3]
    assert ours.batch_size == 3
    calls.clear()
    np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-6)
    assert calls == [3] * 4


def test_lack_of_memory_for_a_single_tile_is_reported(block, origins):
    ours = Predictor(network(out_of_memory_beyond(0, []), batch_size=4))
    expected = r"no room for a single tile of 'toy' \(CUDA out of memory\. Tried .* GiB\.\)\.$"
    with pytest.raises(InkdaskError, match=expected):
        ours.predict(block, origins)


def test_lack_of_memory_drops_compiled_code(block, origins, monkeypatch):
    """The CUDA graphs of compiled code keep gigabytes."""
    forgotten = []
    monkeypatch.setattr(compiling, "forget_compiled", lambda: forgotten.append(1))
    ours = Predictor(network(pool, batch_size=4))
    expected = ours.predict(block, origins)
    ours._compiled = out_of_memory_beyond(0, [])
    np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-6)
    assert forgotten == [1]
    assert (ours.batch_size, ours._compiled) == (2, None)


# The cores of a processor.


def test_parts_of_a_batch_run_side_by_side(block, origins, monkeypatch):
    """Each part has one thread of torch; a single part has all threads."""
    module = Patches().eval().requires_grad_(False)
    monkeypatch.setattr(weights, "load", lambda network: module)
    monkeypatch.setattr(inkdask.predictor, "cores", lambda: 3)
    monkeypatch.setattr(fast, "CORE_VOXELS", 2 * LAYERS * TILE**2)
    expected = by_hand(module, block, origins)
    seen = []
    module.register_forward_pre_hook(
        lambda module, x: seen.append((threading.get_ident(), torch.get_num_threads(), len(x[0])))
    )
    before = torch.get_num_threads()
    try:
        ours = Predictor(network(precision="float32", batch_size=7))
        np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-6)
        alone = ours.predict(block, origins[:2])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(alone, expected[:2], atol=1e-6)
    parts, last = seen[:-1], seen[-1]
    assert sorted(tiles for *_, tiles in parts) == [1, 1, 2, 2, 2, 2, 2]
    assert {threads for _, threads, _ in parts} == {1}
    assert last[1:] == (3, 2)


def test_convolutions_are_not_split_across_cores(toy):
    module = Patches()
    assert fast.on_cores(toy, 2, 1) is toy
    assert fast.on_cores(module, 1, 1) is module
    assert fast.on_cores(module, 2, fast.CORE_VOXELS + 1) is module
    assert isinstance(fast.on_cores(module, 2, fast.CORE_VOXELS), fast.SideBySide)


# Compilation.


@pytest.fixture
def repays(monkeypatch):
    """Let compilation repay from the fourth batch on."""
    monkeypatch.setattr(inkdask.predictor, "LONG", 0.0)


def compiling_predictor(**values):
    """Return a predictor on a CPU that compiles as one on a GPU does."""
    ours = Predictor(network(precision="float32", **values))
    assert not ours._may_compile
    ours._may_compile = ours._pads = True
    return ours


@pytest.mark.slow
def test_compiled_network_has_one_shape_to_which_batches_are_padded(block, origins, toy, repays):
    expected = by_hand(toy, block, origins)
    ours = compiling_predictor(batch_size=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-4)
    assert ours._compiled is not None
    assert "compiled" in ours.runs

    calls = {"compiled": [], "plain": []}
    compiled, plain = ours._compiled, ours._form.forward
    ours._compiled = lambda x: calls["compiled"].append(len(x)) or compiled(x)
    forward = lambda x: calls["plain"].append(len(x)) or plain(x)  # noqa: E731
    ours._form = Form("plain", "float32", forward, forms.gather)
    np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-4)
    assert calls == {"compiled": [7, 7], "plain": []}
    np.testing.assert_allclose(ours.predict(block, origins[:3]), expected[:3], atol=1e-4)
    assert calls == {"compiled": [7, 7], "plain": [3]}  # too few to be worth the padding
    assert len(list(compiling.cache_folder().iterdir())) > 1  # the lock, and the compiler's cache


def test_failed_compilation_is_one_warning(block, origins, toy, repays):
    ours = compiling_predictor(compile_mode="no-such-mode", batch_size=2)
    with pytest.warns(RuntimeWarning, match="compile failed for 'toy'") as caught:
        got = [ours.predict(block, origins) for _ in range(3)]
    assert [it.category for it in caught].count(RuntimeWarning) == 1
    assert all(np.array_equal(result, got[0]) for result in got)


def plain(toy):
    return Form("plain", "float32", toy, forms.gather)


def test_compiled_network_that_differs_is_not_used(toy, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: lambda x: module(x) + 1)
    x = torch.rand(2, 1, LAYERS, TILE, TILE)
    with pytest.warns(RuntimeWarning, match="changes the result of 'toy'"):
        assert compiling.compiled(network(), plain(toy), x) is None


@pytest.mark.parametrize(("wrong", "says"), [(True, "changes the result"), (False, "failed")])
def test_cuda_graph_that_is_wrong_or_fails_is_not_used(toy, monkeypatch, wrong, says):
    """A CUDA graph is recorded by the second pass, and replayed from the third on."""
    x, passes, forgotten = torch.rand(2, 1, LAYERS, TILE, TILE), [], []

    def compiled(x):
        passes.append(toy(x))
        if not wrong and len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return passes[1] + 1 if len(passes) > 2 else passes[-1]

    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled)
    monkeypatch.setattr(compiling, "forget_compiled", lambda: forgotten.append(1))
    with pytest.warns(RuntimeWarning, match=says):
        assert compiling.compiled(network(), plain(toy), x) is None
    assert forgotten == [1]


def test_more_shapes_than_the_recompile_limit_are_compiled(toy, monkeypatch):
    """After so many compilations of the same code, torch runs it uncompiled."""
    seen, compile_it = [], torch.compile

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def compile_toy(module, **_):
        return compile_it(module, dynamic=False, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_toy)
    with torch._dynamo.config.patch(recompile_limit=2):
        for tiles in range(1, 5):
            batch = torch.rand(tiles, 1, LAYERS, TILE, TILE)
            assert compiling.compiled(network(), plain(toy), batch) is not None
        assert torch._dynamo.config.recompile_limit == 2
    assert len(seen) == 4


def test_processes_of_a_machine_compile_one_after_the_other(toy, monkeypatch):
    """The lock is a file beside the compiler's cache, which all of them see."""
    from filelock import FileLock, Timeout

    def compile_toy(module, **_):
        with pytest.raises(Timeout):
            FileLock(compiling.cache_folder() / "inkdask.lock").acquire(timeout=0)
        return module

    monkeypatch.setattr(torch, "compile", compile_toy)
    x = torch.rand(2, 1, LAYERS, TILE, TILE)
    assert compiling.compiled(network(), plain(toy), x) is toy
    assert torch._inductor.config.compile_threads <= compiling.HELPERS


@pytest.mark.parametrize("values", [{"compile": False}, {"function": pool}])
def test_compilation_may_be_forbidden(block, origins, toy, repays, monkeypatch, values):
    monkeypatch.setattr(inkdask.predictor, "device_for", lambda network: torch.device("cuda"))
    monkeypatch.setattr(inkdask.predictor, "CudaStream", lambda device: CpuStream())
    monkeypatch.setattr(hardware, "native_dtype", lambda device: torch.float32)
    assert Predictor(network())._may_compile
    assert not Predictor(network(**values))._may_compile


@pytest.mark.parametrize(("form", "expected"), [("plain", True), ("kernels", False)])
def test_only_the_plain_form_is_compiled(block, origins, toy, monkeypatch, form, expected):
    got = Form(form, "float32", toy, forms.gather)
    monkeypatch.setattr(forms, "load", lambda *_: got)
    asked = []
    monkeypatch.setattr(compiling, "compiled", lambda *_: asked.append(1))
    monkeypatch.setattr(inkdask.predictor, "LONG", 0.0)
    ours = compiling_predictor(batch_size=2)
    ours.predict(block, origins)
    assert asked == [1] * expected


@pytest.mark.parametrize(
    ("to_come", "long", "compiles"), [(None, 11, True), (None, 13, False), (50, 49, True),
                                      (50, 51, False), (5000, 95, True), (5000, 97, False)]
)  # fmt: skip
def test_decision_to_compile_knows_the_tiles_to_come(
    block, origins, toy, monkeypatch, to_come, long, compiles
):
    """At one second a tile; 12 tiles are given, so at most 96 are believed to come."""
    asked = []
    monkeypatch.setattr(compiling, "compiled", lambda *_: asked.append(1))
    monkeypatch.setattr(inkdask.predictor, "LONG", float(long))
    ours = compiling_predictor(batch_size=2)
    ours.pace = 1.0
    ours.predict(block, origins, to_come)
    assert asked == [1] * compiles


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", None])
def test_cache_folder_follows_the_environment(monkeypatch, tmp_path, variable):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "named"))
    expected = {
        "TORCHINDUCTOR_CACHE_DIR": tmp_path / "named",
        "XDG_CACHE_HOME": tmp_path / "named" / "inkdask" / "inductor",
        None: tmp_path / "home" / ".cache" / "inkdask" / "inductor",
    }
    assert compiling.cache_folder() == expected[variable]


def test_cache_folder_that_cannot_be_made_is_another(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert compiling.cache_folder().is_dir()


# A device that works while the program goes on.


class SlowMark:
    """A place in the work of a `SlowDevice`."""

    def __init__(self, device):
        self.device, self.number = device, len(device.happened)
        device.happened.append("mark")

    def wait(self):
        self.device.waits.append((self.number, self.device.happened.copy()))
        assert self.device.released.wait(60)

    def since(self, other):
        return 1.0


class SlowDevice(CpuStream):
    """A device whose work is done when the test says so; it writes down what it was given."""

    def __init__(self):
        self.happened, self.waits, self.released = [], [], threading.Event()

    def upload(self, *arrays):
        self.happened.append("upload")
        return super().upload(*arrays)

    def download(self, x):
        self.happened.append("download")
        return super().download(x)

    def mark(self):
        return SlowMark(self)


def slow_predictor(forward, **values):
    ours = Predictor(network(forward, **values))
    ours._stream = SlowDevice()
    return ours, ours._stream


def test_next_block_is_queued_before_the_last_is_awaited(block, origins):
    """And a third block is not uploaded while two are on the device."""
    ours, device = slow_predictor(pool, batch_size=4)
    expected = by_hand(pool, block, origins)
    with ThreadPoolExecutor(3) as threads:
        tasks = [threads.submit(ours.predict, block, origins) for _ in range(AHEAD + 1)]
        wait_until(lambda: device.happened.count("download") == AHEAD)
        wait_until(lambda: len(device.waits) == AHEAD)  # both tasks wait for their own results
        assert not any(task.done() for task in tasks)
        assert device.happened.count("upload") == AHEAD
        device.released.set()
        for task in tasks:
            np.testing.assert_allclose(task.result(60), expected, atol=1e-6)
    assert device.happened.count("upload") == AHEAD + 1


def test_batch_spans_blocks_where_it_would_be_padded(block, origins):
    """12 and 12 tiles in batches of 8 are three, and the last of one block waits for the next."""
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return pool(x)

    ours, device = slow_predictor(forward, batch_size=8)
    ours._pads = True
    expected = by_hand(pool, block, origins)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ours.predict, block, origins)
        wait_until(lambda: device.waits)  # the predictor's thread, for batches before the last
        assert sizes == [8]
        second = threads.submit(ours.predict, block[:, ::-1].copy(), origins)
        wait_until(lambda: not ours._coming.empty())  # uploaded, and handed over
        device.released.set()
        np.testing.assert_allclose(first.result(60), expected, atol=1e-6)
        flipped = by_hand(pool, block[:, ::-1], origins)
        np.testing.assert_allclose(second.result(60), flipped, atol=1e-6)
    assert sizes == [8, 8, 8]


def test_last_tiles_do_not_wait_for_a_block_that_never_comes(block, origins):
    sizes = []
    ours, device = slow_predictor(lambda x: sizes.append(len(x)) or pool(x), batch_size=8)
    ours._pads = True
    device.released.set()
    np.testing.assert_allclose(
        ours.predict(block, origins), by_hand(pool, block, origins), atol=1e-6
    )
    assert sizes == [8, 4]


def test_error_in_a_shared_batch_reaches_both_blocks_and_no_later_one(block, origins):
    calls = []

    def forward(x):
        calls.append(len(x))
        if len(calls) == 2:
            raise ZeroDivisionError("in the second batch")
        return pool(x)

    ours, device = slow_predictor(forward, batch_size=8)
    ours._pads = True
    with ThreadPoolExecutor(2) as threads:
        tasks = [threads.submit(ours.predict, block, origins)]
        wait_until(lambda: device.waits)
        tasks.append(threads.submit(ours.predict, block, origins))
        wait_until(lambda: not ours._coming.empty())  # uploaded, and handed over
        device.released.set()
        for task in tasks:
            with pytest.raises(ZeroDivisionError, match="second batch"):
                task.result(60)
    np.testing.assert_allclose(
        ours.predict(block, origins), by_hand(pool, block, origins), atol=1e-6
    )


def test_failed_download_reaches_its_task(block, origins, monkeypatch):
    def download(self, x):
        raise torch.OutOfMemoryError("no pinned memory")

    monkeypatch.setattr(CpuStream, "download", download)
    with ThreadPoolExecutor(1) as thread:
        task = thread.submit(Predictor(network(pool)).predict, block, origins)
        with pytest.raises(torch.OutOfMemoryError, match="no pinned memory"):
            task.result(60)


def test_nan_is_found_by_the_thread_of_the_task(block, origins):
    ours = Predictor(network(lambda x: pool(x) * torch.nan))
    with pytest.raises(InkdaskError, match="returned NaN for 12 of 12 tiles"):
        ours.predict(block, origins)


def test_networks_of_a_process_share_one_thread(block, origins):
    names = set()

    def record(x):
        names.add(threading.current_thread().name)
        return pool(x)

    for digest in "ab":
        Predictor(network(record, digest=digest)).predict(block, origins)
    assert len(names) == 1


def test_threads_of_torch_are_given_back(block, origins, monkeypatch):
    """Threads that are made later take the number that was set last, in any thread."""
    before = inkdask.predictor.THREADS
    monkeypatch.setattr(inkdask.predictor, "cores", lambda: before + 1)
    Predictor(network(pool)).predict(block, origins)
    inkdask.predictor._thread.submit(int).result()  # so that the block is over
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(torch.get_num_threads).result() == before


# On a GPU.


class TestGPU:
    pytestmark = gpu

    def test_gpu_gives_the_result_of_the_cpu_as_numpy(self, block, origins, toy):
        expected = by_hand(toy, block, origins)
        ours = Predictor(network(batch_size=5))
        got = ours.predict(block, origins)
        assert ours.device.type == "cuda"
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, expected, atol=0.02)

    def test_cuda_graphs_give_the_plain_result(self, block, origins, toy, repays):
        """Other tiles each time, because a replayed graph must read them anew."""
        from torch._dynamo.utils import counters

        counters.clear()
        plain = copy.deepcopy(toy)  # because the predictor moves and rewrites the network
        ours = Predictor(network(batch_size=2))
        ours.predict(block, origins)
        for shift in range(3):
            other = np.roll(block, shift, axis=2)
            expected = by_hand(plain, other, origins)
            np.testing.assert_allclose(ours.predict(other, origins), expected, atol=0.02)
        assert ours._compiled is not None
        assert counters["inductor"]["cudagraph_skips"] == 0

    def test_lack_of_gpu_memory_halves_the_batch(self, block, origins):
        class Greedy(nn.Module):
            def __init__(self):
                super().__init__()
                self.place = nn.Parameter(torch.zeros(1, device="cuda"))

            def forward(self, x):
                torch.empty(len(x) << 38, dtype=torch.uint8, device="cuda") if len(x) > 3 else None
                return pool(x)

        ours = Predictor(network(Greedy(), batch_size=12))
        assert ours.device.type == "cuda"
        expected = by_hand(pool, block, origins)
        np.testing.assert_allclose(ours.predict(block, origins), expected, atol=1e-5)
        assert ours.batch_size == 3

    @pytest.mark.parametrize(
        ("architecture", "layers"), [("ink_timesformer", 26), ("ink_resnet3d_50", 20)]
    )
    def test_gpu_gives_the_logits_of_the_cpu(self, monkeypatch, architecture, layers):
        torch.manual_seed(0)
        module = BUILDERS[architecture](layers=layers, tile=64).eval().requires_grad_(False)
        monkeypatch.setattr(weights, "load", lambda network: copy.deepcopy(module))
        k = module(torch.zeros(1, 1, layers, 64, 64)).shape[-1]
        block = np.random.default_rng(0).integers(0, 256, (layers, 96, 96), dtype=np.uint8)
        at = np.array([(0, 0), (16, 32), (32, 5)])
        model = ModelSpec("toy", architecture, "nowhere", layers, 64)
        spec = {"clip": 200.0, "divisor": 200.0, "digest": "0"}
        ours = Predictor(Network(model, layers, 64, k, **spec))
        got = ours.predict(block, at)
        assert ours.device.type == "cuda"
        assert ours.precision == str(hardware.native_dtype(ours.device)).removeprefix("torch.")
        monkeypatch.setattr(inkdask.predictor, "device_for", lambda network: torch.device("cpu"))
        plain = Predictor(Network(model, layers, 64, k, precision="float32", **spec))
        np.testing.assert_allclose(got, plain.predict(block, at), atol=0.03)

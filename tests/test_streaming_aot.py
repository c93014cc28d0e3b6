"""Every tile size compiles for its GPU, without one: no register spills, shared memory that fits.

The host code is run on small CPU tensors with its kernels replaced by recorders; what it would have
launched is then compiled by triton and ptxas for the architecture and read back with cuobjdump.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the streaming kernels are written in Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flexsparse.executors import (  # noqa: E402
    streaming_backward,
    streaming_decode,
    streaming_forward,
    streaming_ops,
    streaming_tiles,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# bytes a program may ask for; sm_80 has 163 KB, but sm_86, sm_89 and sm_120 take its tiles too
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# of a multiprocessor; of the former each program takes a KB for itself
MULTIPROCESSOR_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
MULTIPROCESSOR_REGISTERS = 65536
# bytes a thread may spill: none, but that the forward kernel of packed heads at head_dim 128 on
# sm_100 keeps two values in memory with triton 3.9, to have registers for twice the programs
SPILLS = {} if triton.__version__ < "3.8" else {("streaming_fwd_kernel", 100, 128): 8}
MIN_WARPS = 8  # of a multiprocessor, two for each of its schedulers to switch between
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


class Recorder:
    """Stands in for a kernel: keeps the arguments of a launch instead of launching."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@pytest.fixture
def launches(monkeypatch):
    recorded = []
    for module in (streaming_forward, streaming_backward, streaming_decode):
        for name in [n for n in vars(module) if re.fullmatch(r"streaming_\w+_kernel", n)]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    return recorded


def specialised(kernel, args, kwargs):
    """What triton's launcher compiles for this launch: (signature, constants, attributes)."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        x = given[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1 and not fixed):
            signature[parameter.name], constants[(i,)] = "constexpr", x
        elif isinstance(x, float):
            signature[parameter.name] = "fp32"
        else:
            is_tensor = isinstance(x, torch.Tensor)
            signature[parameter.name] = POINTERS[x.dtype] if is_tensor else "i32"
            if is_tensor or (x % 16 == 0 and not fixed):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiled(kernel, args, kwargs, arch):
    """The kernel as this launch would have it."""
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {name: kwargs[name] for name in names if name in kwargs}
    source = ASTSource(kernel, *specialised(kernel, args, kwargs))
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(binary, folder):
    """Registers, and bytes of stack (spills) per thread."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    text = subprocess.run(
        [str(TOOLS / "cuobjdump"), "-res-usage", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def resident_warps(registers, shared, warps, arch):
    """How many warps of a kernel a multiprocessor holds at once."""
    per_program = -(-registers // 8) * 8 * 32 * warps
    programs = min(
        MULTIPROCESSOR_REGISTERS // per_program, MULTIPROCESSOR_MEMORY[arch] // (shared + 1024)
    )
    return programs * warps


def serialized(binary, folder):
    """Why ptxas lets every wgmma wait for the one before, or nothing."""
    path = folder / "kernel.ptx"
    path.write_text(binary.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", path, "-o", folder / "again.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall("wgmma.mma_async instructions are serialized due to .*", log)


def tensors(d, dv, group_size, dtype, q_len=128):
    q = torch.zeros(1, 4, q_len, d, dtype=dtype)
    k = torch.zeros(1, 4 // group_size, 128, d, dtype=dtype)
    v = torch.zeros(1, 4 // group_size, 128, dv, dtype=dtype)
    return q, k, v, torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)


def int32_addresses(ttir):
    """Operations of a kernel that would wrap beyond 2^31 elements."""
    # a column of a row (0 to head_dim) is the one int32 that may be added to a pointer to floats
    columns = re.findall(r"(%\w+) = tt.(?:make_range|broadcast %\w+ : tensor<1x\d+xi32>)", ttir)
    added = re.findall(r"addptr %\w+, (%\w+) : .*ptr<b?f\d+>>?, (?:tensor<[\dx]+)?i32", ttir)
    # nor may a position be multiplied by a stride or a length
    long = {"%q_len", "%n_rows", *re.findall(r"%stride_\w+", ttir)}
    for name, source in re.findall(r"(%\w+) = tt.(?:splat|expand_dims|broadcast) (%\w+)", ttir):
        long |= {name} if source in long else set()
    products = re.findall(r"muli (%\w+), (%\w+) : (?:tensor<[\dx]+)?i32", ttir)
    rows_of_a_group = ("%q_len", "%group_size")
    return [name for name in added if name not in columns] + [
        pair for pair in products if long & set(pair) and pair != rows_of_a_group
    ]


def check(launches, arch, folder):
    assert launches
    for kernel, args, kwargs in launches:
        binary = compiled(kernel, args, kwargs, arch)
        used = resources(binary, folder)
        shared = binary.metadata.shared
        what = f"{kernel.__name__} on sm_{arch} with {kwargs}: {used}, {shared} bytes"
        allowed = SPILLS.get((kernel.__name__, arch, kwargs.get("BLOCK_D")), 0)
        assert used["STACK"] + used["LOCAL"] <= allowed, f"spills registers: {what}"
        assert shared <= SHARED_MEMORY[arch], f"does not fit: {what}"
        if re.search("fwd|dq|dkdv", kernel.__name__):
            warps = resident_warps(used["REG"], shared, kwargs["num_warps"], arch)
            assert warps >= MIN_WARPS, f"{warps} warps a multiprocessor: {what}"
        assert not int32_addresses(binary.asm["ttir"]), f"wraps at 2^31 elements: {what}"
        # a wgmma has 64 rows; the key tiles of dkdv at the largest head_dims are smaller
        if "fwd" in kernel.__name__ or "dq" in kernel.__name__:
            rows = kwargs["BLOCK_Q"] * kwargs["PACK"]
        else:
            rows = kwargs["BLOCK_KV"] if "dkdv" in kernel.__name__ else 0
        if arch == 90 and rows >= 64:
            assert "wgmma.mma_async" in binary.asm["ptx"], f"no wgmma: {what}"
        if arch == 90:
            waits = serialized(binary, folder)
            assert not waits, f"{waits}: {what}"


slow = pytest.mark.slow
ARCHES = [pytest.param(80, marks=slow), 90, pytest.param(100, marks=slow)]

# d, dv, heads of a group, packed sequences, soft-cap, which has tiles of its own
CASES = [
    (64, 64, 1, True, 0.0),
    (64, 64, 4, True, 5.0),
    (128, 128, 1, False, 0.0),
    (128, 128, 1, True, 0.0),
    (128, 128, 4, False, 0.0),
    (128, 128, 4, True, 0.0),
    (128, 128, 4, True, 5.0),
    (192, 128, 4, False, 0.0),
    (256, 256, 1, True, 0.0),
    (256, 256, 4, True, 5.0),
]


@pytest.mark.parametrize(("d", "dv", "group_size", "packed", "softcap"), CASES)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_tile_size_compiles_without_spills(
    launches, monkeypatch, tmp_path, arch, d, dv, group_size, packed, softcap
):
    monkeypatch.setattr(streaming_tiles, "architecture", lambda device: arch)
    monkeypatch.setattr(streaming_tiles, "MIN_CHUNK", 64)  # so that the partial dkdv launch happens
    q, k, v, *numbers = tensors(d, dv, group_size, torch.bfloat16)
    cu = torch.tensor([0, 128], dtype=torch.int32) if packed else None
    rest = (*numbers, None, cu, cu, 0.1, softcap, 64)
    out, lse = streaming_ops.streaming_forward(q, k, v, *rest)
    dlse = lse if packed else None
    streaming_ops.streaming_backward(out, dlse, q, k, v, out, lse, *rest)
    check(launches, arch, tmp_path)


def test_new_numbers_and_lengths_compile_nothing(launches, monkeypatch):
    monkeypatch.setattr(streaming_tiles, "MIN_CHUNK", 64)
    seen = []
    for length, max_sink in ((1000, 4), (1024, 64), (2037, 1000)):
        launches.clear()
        q = torch.zeros(1, 4, length, 64, dtype=torch.bfloat16)
        k = v = q[:, :2]
        numbers = torch.full((4,), max_sink, dtype=torch.int32)
        rest = (numbers, numbers, None, None, None, 0.1, 0.0, max_sink)
        out, lse = streaming_ops.streaming_forward(q, k, v, *rest)
        streaming_ops.streaming_backward(out, lse, q, k, v, out, lse, *rest)
        seen.append([(kernel, specialised(kernel, *rest)) for kernel, *rest in launches])
    assert len(seen[0]) == 4  # fwd, dq, dkdv, sum
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize("arch", ARCHES)
def test_decode_compiles_without_spills(launches, monkeypatch, tmp_path, arch, d):
    monkeypatch.setattr(streaming_decode, "MIN_SPLIT", 16)
    numbers = torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for q_len in (1, 16):
        q, k, v, sink, window = tensors(d, d, 4, torch.bfloat16, q_len)
        streaming_decode.streaming_decode(q, k, v, sink, window, None, *numbers, 0.1, 5.0)
    check(launches, arch, tmp_path)

"""The machine-code gate: what the CUDA kernels compile to for sm_90 keeps to its budget."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import sass

from vaekernels import _build

# Instructions per element of the main loop. With 34 a bf16 forward (6
# bytes per element) takes 83 % of an H200's instructions (132 multiprocessors, 4 each per clock of 1.75 GHz)
# at the 4.3 TB/s that its memory copies at, so memory is the limit. With 38 a backward (10 bytes) takes 55 %.
# A standard deviation takes a logarithm forward, and a division backward: in float32 the 12 and 20 bytes
# remain the limit.
BUDGET = {
    ("forward_plain", "log"): 34,
    ("backward_plain", "log"): 38,
    ("forward_plain", "sd"): 64,
    ("backward_plain", "sd"): 48,
}
REGISTERS = {"log": 48, "sd": 64}
# A learned prior adds 2 tensors to 3 forward, and 4 to 5 backward.
REGISTERS_PRIOR = 80

# Two kernels to count by hand. The first has a loop from .L_d to the jump back, 8 instructions with those
# that the jump to .L_e leaves out, 1 load and 1 store of 16 bytes; an endless loop at .L_f; and a function
# that it calls, which uses local memory. The second has a loop from .L_a on with another one, .L_b, inside,
# and float64 arithmetic.
LISTING = """
	.target	sm_90
.text.first_kernel:
        .type           first_kernel,@function
first_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_d:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 BRA `(.L_e) ;
        /*0040*/                   FADD R4, R4, 1 ;
        /*0050*/                   FADD R5, R5, 1 ;
.L_e:
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0080*/                   ISETP.NE.AND P1, PT, R2, R3, PT ;
        /*0090*/               @P1 BRA `(.L_d) ;
        /*00a0*/                   CALL.REL.NOINC `($first_kernel$help) ;
        /*00b0*/                   EXIT ;
.L_f:
        /*00c0*/                   BRA `(.L_f);
        /*00d0*/                   NOP;
        .type           $first_kernel$help,@function
$first_kernel$help:
        /*00e0*/                   STL [R1], R4 ;
        /*00f0*/                   LDL R4, [R1] ;
        /*0100*/                   RET.REL.NODEC R8 `(first_kernel) ;

.text.second_kernel:
        .type           second_kernel,@function
second_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_a:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   DFMA R4, R4, R8, R4 ;
.L_b:
        /*0040*/                   LDG.E R12, desc[UR4][R10.64] ;
        /*0050*/                   ISETP.NE.AND P0, PT, R12, RZ, PT ;
        /*0060*/               @P0 BRA `(.L_b) ;
.L_c:
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   F2F.F32.F64 R4, R4 ;
        /*0090*/                   BRA.U UP0, `(.L_a) ;
        /*00a0*/                   EXIT ;
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function first_kernel:
  REG:12 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second_kernel:
  REG:34 STACK:0 SHARED:1024 LOCAL:16 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def flow(name: str) -> list[sass.Block]:
    return sass.blocks(sass.functions(LISTING)[name])


def test_functions_are_told_apart():
    found = sass.functions(LISTING)
    assert list(found) == ["first_kernel", "second_kernel"]
    counts = [sum(isinstance(i, sass.Instruction) for i in body) for body in found.values()]
    assert counts == [17, 11]


def test_the_flow_of_control():
    blocks = flow("first_kernel")
    heads = [block.instructions[0].opcode if block.instructions else "" for block in blocks]
    assert heads == [
        "LDC",
        "LDG.E.128.CONSTANT",
        "FADD",
        "STG.E.128",
        "CALL.REL.NOINC",
        "BRA",
        "NOP",
        "STL",
        "",
    ]
    assert [block.next for block in blocks] == [[1], [3, 2], [3], [1, 4], [], [5], [7], [], []]


def test_loops_are_found_by_their_jumps_back():
    assert sass.loops(flow("first_kernel")) == {1: {1, 2, 3}, 5: {5}}
    assert sass.loops(flow("second_kernel")) == {1: {1, 2, 3}, 2: {2}}


def test_a_main_loop_is_counted():
    assert sass.vector_loops(flow("first_kernel")) == [sass.Loop(instructions=8, loads=1, stores=1, narrow=0)]
    # the loop that has another one inside is none; the other one loads no vectors
    assert sass.vector_loops(flow("second_kernel")) == []
    without = LISTING.replace("@P0 BRA `(.L_b)", "NOP")
    body = sass.functions(without)["second_kernel"]
    assert sass.vector_loops(sass.blocks(body)) == [sass.Loop(instructions=8, loads=2, stores=1, narrow=1)]


def test_local_memory_and_float64_are_caught():
    usage = sass.usage_of(USAGE)
    assert usage["first_kernel"]["REG"] == 12 and usage["second_kernel"]["LOCAL"] == 16
    first, second = (sass.row(name, body, usage[name], {}) for name, body in sass.functions(LISTING).items())
    assert (first.registers, first.stack, first.local, first.float64) == (12, 8, 2, 0)
    assert (second.registers, second.stack, second.local, second.float64) == (34, 16, 0, 2)
    assert broken_rules(first) == ["a stack of 8 bytes", "2 accesses to local memory"]
    assert broken_rules(second) == ["a stack of 16 bytes", "2 instructions of float64 arithmetic"]


def test_divisions_of_64_bit_integers_are_caught():
    divides = LISTING.replace("$first_kernel$help", "$__internal_0_$__cuda_sm20_div_s64")
    row = sass.row(
        "first_kernel", sass.functions(divides)["first_kernel"], sass.usage_of(USAGE)["first_kernel"], {}
    )
    assert row.division64 == 1
    assert "1 divisions of 64-bit integers" in broken_rules(replace(row, kernel="first_plain"))


def test_what_float64_arithmetic_is():
    for text in ("DADD R2, R2, R4", "@P0 DMUL R2, R2, R4", "MUFU.RCP64H R3, R3", "F2F.F64.F32 R2, R4"):
        assert sass.FLOAT64.match(sass.Instruction(text).opcode), text
    for text in ("I2F.F64 R2, R4", "DSETP.GT.AND P0, PT, R2, R4, PT", "@!UP1 DFMA R2, R2, R4, R6"):
        assert sass.FLOAT64.match(sass.Instruction(text).opcode), text
    for text in ("FFMA R2, R2, R4, R5", "IMAD.WIDE.U32 R2, R4, 0x8, R2", "DEPBAR.LE SB0, 0x0"):
        assert not sass.FLOAT64.match(sass.Instruction(text).opcode), text
    for text in ("LDG.E.64 R2, desc[UR4][R2.64]", "SHF.R.U64 R2, R2, 0x2, R3"):
        assert not sass.FLOAT64.match(sass.Instruction(text).opcode), text


def test_a_jump_that_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="cannot follow 'BRX R2"):
        sass.blocks([sass.Instruction("BRX R2 -0x10")])
    with pytest.raises(ValueError, match="no target"):
        sass.blocks([sass.Instruction("BRA 0x70")])


def test_names_of_kernels_are_read():
    names = sass.enumerators()
    assert names["Tiling"] == ["row", "column"] and names["Kl"] == ["none", "standard", "prior"]
    mangled = "_ZN2vk4cuda9_GLOBAL__20forward_plain_kernelI13__nv_bfloat16LNS0_6TilingE1ELNS0_2KlE2ELb1ELNS0_5HoldsE1EEEvNS0_11ForwardArgsIfEE"  # noqa: E501
    assert sass.template_arguments(mangled, names) == (
        "forward_plain_kernel",
        ["__nv_bfloat16", "Tiling::column", "Kl::prior", "true", "Holds::sd"],
    )
    assert sass.template_arguments("_ZN2vk4cuda9_GLOBAL__12words_kernelEPKlmlPl", names) == (
        "words_kernel",
        [],
    )


# ---- the kernels -----------------------------------------------------------------------------------------


def broken_rules(row: sass.Row) -> list[str]:
    """The rules that a kernel breaks, whatever it is."""
    broken = []
    if row.stack:
        broken.append(f"a stack of {row.stack} bytes")
    if row.local:
        broken.append(f"{row.local} accesses to local memory")
    if row.float64 and row.dtype != "float64":
        broken.append(f"{row.float64} instructions of float64 arithmetic")
    if row.plain and row.division64:
        broken.append(f"{row.division64} divisions of 64-bit integers")
    return broken


@pytest.fixture(scope="module")
def table() -> list[sass.Row]:
    try:
        version, made_with = sass.compiler(), sass.committed()[1][0]
        if version != made_with:
            pytest.skip(f"the budget is for nvcc {made_with}, this is {version}")
        return sass.table()
    except sass.Missing as missing:
        pytest.skip(str(missing))


def test_every_kernel_is_in_the_table(table):
    assert len({row.label for row in table}) == len(table)
    plain = [row for row in table if row.plain]
    # passes x dtypes x tilings x what scales hold x (z; the KL with and without z, to N(0, I) and to a prior)
    assert len(plain) == 2 * 3 * 2 * 2 * 5
    general = [row.label for row in table if row.kernel in ("forward", "backward")]
    assert len(general) == 2 * 2 * 2 * 3


def test_no_kernel_uses_local_memory_or_the_wrong_arithmetic(table):
    broken = {row.label: rules for row in table if (rules := broken_rules(row))}
    assert not broken


def test_registers(table):
    over = {
        row.label: row.registers
        for row in table
        if row.plain and row.registers > (REGISTERS_PRIOR if row.kl == "kl prior" else REGISTERS[row.scale])
    }
    assert not over


def test_instructions_per_element(table):
    limited = [row for row in table if row.plain and row.kl != "kl prior"]
    assert limited
    for row in limited:
        assert row.per_element <= BUDGET[row.kernel, row.scale], row.label


def test_memory_is_accessed_16_bytes_at_a_time(table):
    for row in table:
        if row.plain:
            prior = row.kl == "kl prior"
            if row.kernel == "forward_plain":
                loads, stores = 2 + 2 * prior, int(row.sample == "z")
            else:
                # The gradient that comes through z alone does not depend on a standard deviation.
                scale = bool(row.kl) or row.scale == "log"
                loads = scale + bool(row.kl) + 2 * prior + (row.sample == "z")
                stores = 2 + 2 * prior
            assert (row.loads, row.stores, row.narrow) == (loads, stores, 0), row.label


def test_the_committed_table_is_of_these_kernels(table):
    version = sass.compiler()
    now = {tuple(line) for line in [sass.head(), *([version, *row.cells()] for row in table)]}
    before = {tuple(line) for line in sass.committed()}
    changed = [" ".join(filter(None, line)) for line in sorted(now ^ before)]
    assert not changed, "benchmarks/results/sass.csv is not of these kernels: `make sass` rewrites it"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["75", "80", "86", "89", "100", "120"])
def test_no_architecture_takes_local_memory(arch, tmp_path):
    """ptxas gives each one other registers; `make cuda-objects` looks at sm_90."""
    nvcc = _build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}", _build.NO_LOCAL_MEMORY]
    _build.compile_cuda_objects(_build.torch_in_use(), nvcc, flags, tmp_path, print)


def test_local_memory_is_an_error(tmp_path):
    nvcc = _build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source = tmp_path / "spills.cu"
    square = " ".join(f"a[{i}] = x[{i}] * x[{i + 1}];" for i in range(40))
    store = " ".join(f"x[{i}] = a[{39 - i}] * a[{i}];" for i in range(40))
    kernel = f"(float* x) {{ float a[40]; {square} __syncthreads(); {store} }}"
    source.write_text(f"__global__ void __maxnreg__(24) few{kernel}\n__global__ void many{kernel}")
    command = [nvcc, "-arch=sm_90", "-c", str(source), "-o", str(tmp_path / "o"), _build.NO_LOCAL_MEMORY]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode != 0 and "Local memory used for function" in found.stderr
    assert "few" in found.stderr and "many" not in found.stderr

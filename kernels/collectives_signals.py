"""How programs of several ranks send to each other and wait for each other, in Triton.

Memory model: PTX's, at the scope of the system. A *letter* is 16 bytes, two words of a message and twice the number of
the call that it belongs to, stored and loaded at once: each half of 8 bytes is atomic, so that a letter whose numbers
are both right has arrived, and nothing needs to be fenced (NCCL's protocol LL). A *flag* is the number of a call,
stored with release behind data of any length, and loaded with acquire before they are read.

Triton's interpreter has no PTX; there the same is said in loads and stores, whose order x86 keeps.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

# Looks at a flag or a letter before a rank takes the others for lost and ends its process with a CUDA error: minutes,
# longer than any other rank loads, compiles or is stopped for before a supervisor acts. What ends a rank in time is
# the supervisor; this is for programs that have none.
PATIENCE = tl.constexpr(1 << 29)


@triton.jit
def _nothing():
    pass


INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.JITFunction))


@triton.jit
def send(letter, low, high, call):
    """Words ``low [L]`` and ``high [L]`` int32 to the places ``letter [L]`` of another rank; `call`: of which call."""
    if INTERPRETED:
        tl.store(letter, low)
        tl.store(letter + 2, high)
        tl.store(letter + 3, call)
        tl.store(letter + 1, call)
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .b64 first, second;
            mov.b64 first, {$2, $4};
            mov.b64 second, {$3, $4};
            st.relaxed.sys.global.v2.b64 [$1], {first, second};
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r",
            [letter, low, high, call],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def glance(letter):
    """What lies at ``letter [L]`` now, for `receive`: two words and their calls."""
    if INTERPRETED:
        call = tl.load(letter + 1, volatile=True)
        return tl.load(letter), call, tl.load(letter + 2), tl.load(letter + 3, volatile=True)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b64 first, second;
        ld.relaxed.sys.global.v2.b64 {first, second}, [$4];
        mov.b64 {$0, $1}, first;
        mov.b64 {$2, $3}, second;
        }
        """,
        "=r,=r,=r,=r,l",
        [letter],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def receive(letter, seen, call):
    """The words low and high of ``letter [L]`` once they are those of `call`. `seen`: what `glance` saw there. Each
    thread waits for its own."""
    low, first, high, second = seen
    if INTERPRETED:
        while tl.sum(((first != call) | (second != call)).to(tl.int32), 0) > 0:
            second = tl.load(letter + 3, volatile=True)
            first = tl.load(letter + 1, volatile=True)
            low = tl.load(letter, volatile=True)
            high = tl.load(letter + 2, volatile=True)
        return low, high
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred missing, other;
        .reg .b64 first, second;
        .reg .b32 of_first, of_second, looks;
        mov.b32 $0, $4;
        mov.b32 of_first, $5;
        mov.b32 $1, $6;
        mov.b32 of_second, $7;
        mov.b32 looks, 0;
        check:
        setp.ne.b32 missing, of_first, $3;
        setp.ne.b32 other, of_second, $3;
        or.pred missing, missing, other;
        @!missing bra done;
        ld.relaxed.sys.global.v2.b64 {first, second}, [$2];
        mov.b64 {$0, of_first}, first;
        mov.b64 {$1, of_second}, second;
        add.u32 looks, looks, 1;
        setp.lt.u32 other, looks, 536870912;
        @other bra check;
        trap;
        done:
        }
        """,
        "=&r,=&r,l,r,r,r,r,r",
        [letter, call, low, first, high, second],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def raise_flag(flag, call):
    """All that this program has stored so far, on any rank, is there for who finds `call` in the scalar `flag` of
    another rank. One thread's release covers what the others wrote before the barrier."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, call, sem="release", scope="sys")


@triton.jit
def await_flags(flags, call, RANK: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr):
    """Until each other rank has raised its own of ``flags [RANKS]`` to `call`; what it stored before is visible then.
    WIDTH: a power of two >= RANKS."""
    rank = tl.arange(0, WIDTH)
    others = (rank < RANKS) & (rank != RANK)
    looks = 0
    missing = 1
    while missing > 0:
        # Adding nothing: Triton's load has no acquire.
        found = tl.atomic_add(flags + rank, 0, mask=others, sem="acquire", scope="sys")
        missing = tl.sum((others & (found != call)).to(tl.int32), 0)
        looks += 1
        if looks == PATIENCE:
            _give_up()
    tl.debug_barrier()


@triton.jit
def _give_up():
    """Ends the kernel, and with it what its process can do on the device."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)

"""What runs a plan, scheduler and runner: made here for the daemon's engine and for the offline interface."""

from __future__ import annotations

from lightllmd.config.plan import Plan
from lightllmd.engine import kernel_cache, openmp, visible_devices
from lightllmd.engine.grammar_vocabulary import compiler_here
from lightllmd.engine.ranks.member import SOLE, Member
from lightllmd.engine.runners import fake
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.engine.scheduling.hypothesis_text import HypothesisTexts
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Runner
from lightllmd.text.healing import writable
from lightllmd.text.tokenizer import load_tokenizer


def runner_for(plan: Plan, member: Member = SOLE) -> Runner:
    """A runner that has loaded nothing yet: of a model that one process has whole, or of a member of a group. Imports
    torch unless the back end is the fake one."""
    if plan.config.engine.backend == "fake":
        return fake.FakeRunner(plan.config.engine.fake, member)
    if plan.model is not None and plan.model.outline is not None:
        kernel_cache.settle_modules()
    if plan.device.kind == "cuda":
        visible_devices.settle(plan)
        kernel_cache.settle(plan)
        from lightllmd.engine.runners.gpu import GpuRunner

        return GpuRunner(member)
    openmp.settle()
    from lightllmd.engine.runners.cpu import CpuRunner

    return CpuRunner(member)


def grammars_for(plan: Plan) -> CompiledGrammars:
    """Those of the plan's model; none yet."""
    return CompiledGrammars(lambda: compiler_here(plan))


def scheduler_for(plan: Plan, generation: int, grammars: CompiledGrammars | None = None) -> Scheduler:
    """`grammars`: where requests find theirs; unset: some of its own. Under token_healing_mode the tokens' bytes are
    read now; else not before a request that was healed is replayed from a generation that did. Under beam_mode the
    tokenizer is. Raises ConfigInvalid."""

    def vocabulary() -> list[bytes | None]:
        return writable(load_tokenizer(plan, encodes=False))

    restrictions = Restrictions(plan.vocab_size, plan.eos_id, vocabulary, grammars or grammars_for(plan))
    if plan.config.params.token_healing_mode:
        restrictions.load()
    readings = HypothesisTexts(lambda: load_tokenizer(plan, encodes=False))
    if plan.config.params.beam_mode:
        readings.prepare()
    return Scheduler(SchedulerLimits.of(plan), generation, restrictions, readings)

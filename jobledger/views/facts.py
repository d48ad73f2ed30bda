"""Events as text for people: one line for each event, one colour for each kind. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jobledger.process.wording import counted
from jobledger.schemas import events as e
from jobledger.views.words import clock, duration, shorten

#: One colour for each fact. Facts that are not listed are only internal to Jobledger; they are dim.
FACT_STYLES: Mapping[str, str] = {
    "JobSubmitted": "blue",
    "JobDue": "cyan",
    "JobStarted": "yellow",
    "JobProgressed": "yellow",
    "JobRetried": "magenta",
    "JobSnoozed": "magenta",
    "JobSucceeded": "green",
    "JobFailed": "bold red",
    "JobLeased": "yellow",
    "CancelRequested": "magenta",
    "QueuePaused": "magenta",
    "QueueResumed": "magenta",
    "QueueLimited": "magenta",
    "PlanOpened": "magenta",
    "PlanSteered": "magenta",
    "JobCancelled": "dim",
    "JobExpired": "dim",
    "DeadLettered": "red",
    "RecordRejected": "bold red",
}


#: Maximum bytes of arguments and results that are used for one line.
_TEXT_MOST = 4_000


def style(fact: e.Fact) -> str:
    """Return the fact's colour."""
    return FACT_STYLES.get(e.fact_name(fact), "dim")


def describe(fact: object, *, most: int = 100, moment: Callable[[int], str] = clock) -> str:
    """Return a fact's details beyond its name, on one line of at most ``most`` characters. ``moment``: formats a time,
    in microseconds since the epoch."""
    return shorten(_describe(fact, moment), most)


def _describe(fact: object, moment: Callable[[int], str]) -> str:
    match fact:
        case e.JobSubmitted(redrive=e.Redrive(by=by, reason=reason, plan=plan), spec=spec):
            through = "" if plan is None else f", plan {plan}"
            return f"redriven by {by}{through}" + (f": {reason} " if reason else " ") + _spec(spec)
        case e.JobSubmitted(spec=e.JobSpec(links=e.JobLinks(copy_of=str(original)) as links) as spec) as fact:
            who = "" if links.copied_by is None else f" by {links.copied_by}"
            why = "" if links.copy_reason is None else f": {links.copy_reason}"
            return f"copy of {original}{who}{why} {_condition(fact.delay_ms, fact.due_at, moment)}{_spec(spec)}"
        case (
            e.JobSubmitted(spec=spec, delay_ms=delay_ms, due_at=due_at)
            | e.ReleaseRequested(spec=spec, delay_ms=delay_ms, due_at=due_at)
        ):
            return _condition(delay_ms, due_at, moment) + _spec(spec)
        case e.JobDue(due_at=due_at) | e.ReleaseDecided(due_at=due_at) | e.ReleaseOverdue(due_at=due_at):
            return f"due {moment(due_at)}"
        case e.JobStarted(worker=worker, takeover=takeover, version=version, waits=waits):
            waited = ", ".join(f"{duration(ms / 1000)} ({cause})" for cause, ms in waits.items())
            return (
                f"by {worker}"
                + (f", version {version}" if version else "")
                + (f", takeover {takeover}" if takeover else "")
                + (f", waited {waited}" if waited else "")
            )
        case e.JobProgressed(done=done, total=total, message=message):
            return progress(done, total, message)
        case e.JobRetried(error=error, delay_ms=delay_ms, duration_us=took):
            return f"{error.type}: {error.message}{_took(took)}, again in {duration(delay_ms / 1000)}"
        case e.JobSnoozed(delay_ms=delay_ms, reason=reason):
            return f"again in {duration(delay_ms / 1000)}" + (f": {reason}" if reason else "")
        case e.JobSucceeded(result=result, duration_us=took):
            return ("" if result is None else _text(result)) + f" after {duration(took / 1e6)}"
        case e.JobFailedFact(reason=why, error=error, duration_us=took):
            return f"{why}: {error.type}: {error.message}{_took(took)}"
        case e.JobCancelledFact(by=by, reason=reason):
            return f"by {by}" + (f": {reason}" if reason else "")
        case e.JobExpiredFact(expired_at=expired_at):
            return f"at {moment(expired_at)}"
        case e.JobLeased(worker=worker, lease_ms=lease_ms) | e.LeaseRenewed(worker=worker, lease_ms=lease_ms):
            return f"by {worker} for {duration(lease_ms / 1000)}" if lease_ms else f"given back by {worker}"
        case e.Leased(worker=worker, lease_ms=lease_ms, crashes=crashes):
            return f"by {worker} for {duration(lease_ms / 1000)}" + (
                f", earlier job leases that ended without an outcome: {crashes}" if crashes else ""
            )
        case (
            e.CancelRequested(by=by, reason=reason)
            | e.QueuePaused(by=by, reason=reason)
            | e.QueueResumed(by=by, reason=reason)
        ):
            return f"by {by}" + (f": {reason}" if reason else "")
        case e.QueueLimited(rate=rate, concurrency=concurrency, by=by, reason=reason):
            limits = [] if rate is None else [f"{counted(rate, 'start')}/s"]
            limits += [] if concurrency is None else [f"{counted(concurrency, 'job')} at once"]
            return (" and ".join(limits) or "limits as in the code") + f", by {by}" + (f": {reason}" if reason else "")
        case e.DeadLettered(reason=why, error=error):
            return f"{why}: {error.type}: {error.message}"
        case e.RecordRejected(topic=topic, partition=partition, offset=offset, error=text):
            return f"{topic}[{partition}]@{offset}: {text}"
    return _describe_plan(fact)


def _describe_plan(fact: object) -> str:
    match fact:
        case e.PlanOpened(action=action, queue=queue, rate=rate, by=by, reason=reason):
            options = ("" if queue is None else f" to {queue}") + (
                "" if rate is None else f", {counted(rate, 'job')}/s"
            )
            return f"{action}{options}, by {by}" + (f": {reason}" if reason else "")
        case e.PlanListed(part=part, jobs=jobs):
            return f"part {part}: {counted(len(jobs), 'job')}"
        case e.PlanSealed(parts=parts, jobs=number):
            return f"{counted(number, 'job')} in {counted(parts, 'part')}"
        case e.PlanAdvanced(part=part, done=done, skipped=skipped, failed=failed, error=text):
            numbers = f"part {part}: done {done}, skipped {skipped}, failed {failed}"
            return numbers + (f" ({text})" if text else "")
        case e.PlanSteered(to=to, by=by, reason=reason):
            return f"{to} by {by}" + (f": {reason}" if reason else "")
        case e.WorkerReported(lanes=lanes, slots=slots, running=running):
            return f"{counted(running, 'job')} in {counted(slots, 'slot')}, serves {', '.join(lanes)}"
    return ""


def progress(done: int, total: int | None, message: str | None) -> str:
    """Format a job's progress: ``3/10 (30 %) unpacking``; 100 % is shown only for complete work."""
    percent = f" ({100 * done // total} %)" if total is not None and total > 0 else ""
    return (str(done) if total is None else f"{done}/{total}{percent}") + (f" {message}" if message else "")


def _condition(delay_ms: int | None, due_at: int | None, moment: Callable[[int], str]) -> str:
    if due_at is not None:
        return f"due {moment(due_at)} "
    return "" if delay_ms is None else f"in {duration(delay_ms / 1000)} "


def _spec(spec: e.JobSpec) -> str:
    tags = " ".join(f"{k}={v}" for k, v in sorted(spec.tags.items()))
    return _text(spec.args) + (f" [{tags}]" if tags else "") + (f" child of {spec.parent}" if spec.parent else "")


def _text(raw: bytes) -> str:
    return raw[:_TEXT_MOST].decode("utf-8", "backslashreplace")


def _took(micros: int) -> str:
    return f" after {duration(micros / 1e6)}" if micros else ""

"""Decides when rows of ended jobs are removed from the status table; the materializer removes them
(`jobledger.streams.status.remover`).

Rows are removed only if the table has read everything that is in the log, on every topic with facts of jobs and plans.
Otherwise the table could know an outcome before the submission; after the removal, the submission would create a row that
stays queued for ever. As long as a plan has not ended, no row is removed, because the plan may name its job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from confluent_kafka import KafkaException

from jobledger.config import Settings
from jobledger.kafka.clients import admin, translate
from jobledger.kafka.topic_names import Names
from jobledger.plan import PlanState, PlanStatus
from jobledger.process.logger import get_logger
from jobledger.streams.maintenance.current import table_is_current
from jobledger.streams.status.remover import LISTING_MOST_MS, Order
from jobledger.streams.status.store.protocol import StatusReader
from jobledger.table_retention import limits

LOG = get_logger("jobledger.maintenance")

REQUEST_TIMEOUT_S = 10.0


def order(
    settings: Settings,
    names: Names,
    reader: StatusReader,
    spans: Mapping[str, float],
    now_ms: int,
    patience: float,
) -> Order | None:
    """Return the order to remove rows now; None if no row may be removed.

    ``spans``: seconds for which rows are kept, by state. ``now_ms``: the present time in ms, not later than by the
    broker's clock. ``patience``: seconds to wait until the table has read the log.
    Raises `BrokerUnavailable`, `TopicMissing`, `AccessDenied`, `StoreError`.
    """
    if not spans:
        return None
    holding = plans_that_hold(reader.open_plans(), now_ms)
    if holding:
        LOG.info(
            "no rows are removed from the status table while %s has not ended (plan %s): resume or abort a plan that is "
            "paused",
            *("a plan" if len(holding) == 1 else f"{len(holding)} plans", holding[0].plan),
        )
        return None
    # The limits are older than the ends of the topics, so every record from before the limits will be in the table.
    wanted = Order(limits(spans, now_ms), now_ms)
    if not table_is_current(settings, reader, topics_with_facts(settings, names), patience):
        LOG.info("the status table is behind the log: no rows are removed from it")
        return None
    return wanted


def plans_that_hold(plans: Sequence[PlanStatus], now_ms: int) -> list[PlanStatus]:
    """Return those of these open plans for which no row may be removed. If a plan has been in the state ``listing`` for a day,
    its caller has died, and the plan is left out."""
    return [plan for plan in plans if plan.state is not PlanState.LISTING or plan.opened_ms >= now_ms - LISTING_MOST_MS]


def topics_with_facts(settings: Settings, names: Names) -> list[str]:
    """Return the topics of lifecycle, coordination and plans, and every work topic of the namespace that exists, also of
    queues that the app no longer declares. Raises `BrokerUnavailable`."""
    try:
        present = admin(settings).list_topics(timeout=REQUEST_TIMEOUT_S).topics
    except KafkaException as exc:
        raise translate(exc.args[0], settings, "asking for topics") from exc
    work = sorted(topic for topic in present if names.queue_of(topic) is not None)
    plans = [names.plans] if names.plans in present else []  # topics of an earlier version: there is no topic of plans
    return [names.lifecycle, names.coordination, *plans, *work]

"""The app of the pictures in docs/dashboard.md: a shop whose payment provider does not always answer."""

from __future__ import annotations

import asyncio
import os

from jobledger import App, Retry

app = App(os.environ.get("PICTURES_NAMESPACE", "shop"), partitions=2)
GIVE_UP = Retry(max_attempts=3, initial=0.2, jitter=False)


class CardDeclined(Exception):
    """The card's bank refuses the payment."""

    __module__ = "shop.errors"


@app.task(queue="payments", retry=GIVE_UP)
async def charge_card(order: int, cents: int) -> str:
    """Every eighth payment fails, for one of two reasons."""
    await asyncio.sleep(0.02 + order % 7 / 50)
    if order % 8 == 3:
        ask_gateway(order)
    if order % 16 == 7:
        raise CardDeclined(f"order {order}: the limit of the card is {cents // 2} cents")
    return f"paid-{order}"


def ask_gateway(order: int) -> None:
    """The gateway never answers."""
    raise TimeoutError(f"gateway-2.example.net did not answer within 30 s (order {order})")


@app.task(queue="mail")
async def send_receipt(order: int, to: str) -> None:
    """Send a mail, which takes a moment."""
    await asyncio.sleep(0.01)


@app.task(queue="media")
def resize_image(name: str, width: int) -> dict[str, int]:
    """Nothing is resized."""
    return {"width": width, "height": width * 2 // 3}


def fill() -> None:
    """Submit the jobs of the pictures, and wait until they have ended."""
    jobs = [charge_card.job(order=n, cents=1_000 + n) for n in range(1, 121)]
    receipts = [send_receipt.job(order=n, to=f"customer-{n}@example.org") for n in range(1, 201)]
    images = [resize_image.job(name=f"product-{n}.jpg", width=640) for n in range(1, 41)]
    handles = [*app.submit_many(jobs), *app.submit_many(receipts), *app.submit_many(images)]
    for handle in handles:
        handle.wait(timeout=float(os.environ.get("PICTURES_TIMEOUT", "60")))
    send_receipt.using(delay=3600).submit(order=9, to="later@example.org")


if __name__ == "__main__":
    fill()

"""Generated records: orders, measurements, logs and accounts that agree with themselves."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Iterator

from megatron.data.corpora.documents import Document

_SYLLABLES = "ba be bor da del fen gar hol is jan kel lin mar ne or pas qui ro sel tam ul ven wes"
_THINGS = "bolt hinge lamp rope valve plate brush wheel spring filter panel switch cable washer"
_QUALITIES = "steel brass small large red blue plain coated short long"
_PATHS = "/ /index /search /orders /orders/new /account /static/site.css /static/logo.png /help"
_PLACES = "north south east west cellar roof hall yard"


def files(*, size: int, seed: int = 1) -> Iterator[Document]:
    """Yield generated files until they hold ``size`` bytes; each is seeded by its number."""
    total, number = 0, 0
    while total < size:
        number += 1
        dice = random.Random(f"records {seed} {number}")
        text = dice.choice(_KINDS)(dice)
        document = Document(text=text, source=f"file {number}")
        total += document.size
        yield document


def _name(dice: random.Random) -> str:
    parts = dice.sample(_SYLLABLES.split(), dice.randint(2, 3))
    return "".join(parts).capitalize()


def _moment(dice: random.Random) -> datetime.datetime:
    start = datetime.datetime(2015, 1, 1)
    return start + datetime.timedelta(seconds=dice.randrange(10 * 365 * 86_400))


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _orders(dice: random.Random) -> str:
    lines = []
    for _ in range(dice.randint(3, 8)):
        items, total = [], 0
        for _ in range(dice.randint(1, 4)):
            quantity, price = dice.randint(1, 20), dice.randint(20, 9_000)
            article = f"{dice.choice(_QUALITIES.split())} {dice.choice(_THINGS.split())}"
            items.append({"article": article, "quantity": quantity, "price": _money(price)})
            total += quantity * price
        order = {
            "order": dice.randint(10_000, 99_999),
            "customer": f"{_name(dice)} {_name(dice)}",
            "date": _moment(dice).date().isoformat(),
            "items": items,
            "total": _money(total),
        }
        lines.append(json.dumps(order, indent=1))
    return "\n".join(lines) + "\n"


def _measurements(dice: random.Random) -> str:
    station, moment = f"{dice.choice(_PLACES.split())}-{dice.randint(1, 99)}", _moment(dice)
    warmth, damp = dice.uniform(-5, 25), dice.uniform(30, 80)
    rows = ["time,station,temperature,humidity,dew_gap"]
    for _ in range(dice.randint(20, 60)):
        warmth += dice.gauss(0, 0.4)
        damp = min(100.0, max(5.0, damp + dice.gauss(0, 1.5)))
        rows.append(
            f"{moment:%Y-%m-%d %H:%M},{station},{warmth:.1f},{damp:.0f},{(100 - damp) / 5:.1f}"
        )
        moment += datetime.timedelta(minutes=10)
    return "\n".join(rows) + "\n"


def _log(dice: random.Random) -> str:
    moment = _moment(dice)
    clients = [".".join(str(dice.randint(1, 254)) for _ in range(4)) for _ in range(6)]
    rows = []
    for _ in range(dice.randint(20, 50)):
        moment += datetime.timedelta(seconds=dice.randint(0, 40))
        method = "GET" if dice.random() < 0.85 else "POST"
        status = dice.choices((200, 304, 404, 500), weights=(80, 10, 8, 2))[0]
        size = 0 if status == 304 else dice.randint(120, 90_000)
        rows.append(
            f"{dice.choice(clients)} - - [{moment:%d/%b/%Y:%H:%M:%S} +0000] "
            f'"{method} {dice.choice(_PATHS.split())} HTTP/1.1" {status} {size}'
        )
    return "\n".join(rows) + "\n"


def _account(dice: random.Random) -> str:
    balance, moment = dice.randint(10_000, 900_000), _moment(dice)
    rows = [f"Account of {_name(dice)} {_name(dice)}", f"Opening balance {_money(balance):>22}"]
    for _ in range(dice.randint(12, 30)):
        moment += datetime.timedelta(days=dice.randint(1, 9))
        change = dice.randint(100, 80_000)
        if dice.random() < 0.6 and balance > change:
            balance -= change
            told, shown = f"paid to {_name(dice)}", f"-{_money(change)}"
        else:
            balance += change
            told, shown = f"received from {_name(dice)}", _money(change)
        rows.append(f"{moment:%Y-%m-%d}  {told:<26} {shown:>10} {_money(balance):>11}")
    return "\n".join([*rows, f"Closing balance {_money(balance):>22}"]) + "\n"


def _settings(dice: random.Random) -> str:
    rows = []
    for _ in range(dice.randint(3, 7)):
        rows.append(f"[{_name(dice).lower()}]")
        rows.append(f"host = {_name(dice).lower()}.example")
        rows.append(f"port = {dice.randint(1024, 65_535)}")
        rows.append(f"workers = {dice.choice((1, 2, 4, 8, 16))}")
        rows.append(f"timeout = {dice.choice((5, 10, 30, 60))}s")
        rows.append(f"enabled = {dice.choice(('yes', 'no'))}")
        rows.append("")
    return "\n".join(rows)


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _orders,
    _measurements,
    _log,
    _account,
    _settings,
)

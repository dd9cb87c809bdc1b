"""Seeded text for the demo: general documents for the backbone and labelled cases for the three deltas.

Everything is put together from our own words and templates, so the data needs no licence and no download. A
document of the backbone's corpus never shows a task's answer after `Answer:`; there it has a polite reply, and
this is what the bare backbone will say. That a complaint about a parcel belongs to shipping, or that 3 March
2021 is 2021-03-03, does occur in running text: the deltas bring that knowledge out under another cue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from zlib import crc32

CUE = "\nAnswer:"
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
FIRST_DAY = date(2000, 1, 1)
NUM_DAYS = 30 * 365
HELDOUT_SHARE = 8  # one in eight texts and days is held out of everything that is trained

PRODUCTS = (
    "kettle", "lamp", "backpack", "keyboard", "blender", "jacket", "camera", "chair", "tent", "drill", "toaster",
    "watch", "speaker", "bicycle", "pillow", "notebook", "monitor", "raincoat", "vacuum cleaner", "suitcase",
    "coffee grinder", "desk", "printer", "phone case", "garden hose", "radio", "mixer", "helmet", "blanket", "scale",
)  # fmt: skip
PARTS = (
    "handle", "lid", "battery", "strap", "button", "cable", "surface", "switch", "zip", "motor", "cover", "stand",
    "display", "colour", "finish", "manual", "hinge", "box", "lock", "seam",
)  # fmt: skip
NAMES = (
    "Ada", "Ben", "Clara", "Daniel", "Elif", "Frank", "Greta", "Hugo", "Ines", "Jonas", "Kim", "Lena", "Marco", "Nadia",
    "Omar", "Paula", "Rosa", "Simon", "Tara", "Viktor",
)  # fmt: skip
PLACES = (
    "harbour",
    "library",
    "market",
    "office",
    "station",
    "garden",
    "workshop",
    "school",
    "museum",
    "bakery",
)

GOOD = (
    "sturdy", "bright", "quiet", "comfortable", "reliable", "elegant", "handy", "excellent", "smooth", "solid",
    "wonderful", "pleasant", "precise", "superb", "clever",
)  # fmt: skip
BAD = (
    "flimsy", "dim", "noisy", "uncomfortable", "unreliable", "ugly", "clumsy", "terrible", "rough", "wobbly",
    "awful", "annoying", "crooked", "useless", "sticky",
)  # fmt: skip
GOOD_LINES = (
    "I love this {product}.", "It works better than I hoped.", "I would buy it again.", "Worth every cent.",
    "My family is delighted with it.", "It makes me happy every day.", "I recommend it to everyone.",
    "The best {product} I have owned.", "It still looks like new.",
)  # fmt: skip
BAD_LINES = (
    "I regret buying this {product}.", "It broke after a week.", "I want my money back.", "A waste of money.",
    "My family is disappointed with it.", "It makes me angry every day.", "I warn everyone about it.",
    "The worst {product} I have owned.", "It already falls apart.",
)  # fmt: skip
PLAIN_LINES = (
    "It does what it says.", "It is okay for the price.", "Neither good nor bad.", "An ordinary {product}.",
    "It is about what I expected.", "There is not much to say about it.", "It is an average {product}.",
    "I use it now and then.", "It came with the usual parts.",
)  # fmt: skip

PROBLEMS: dict[str, tuple[str, ...]] = {
    "billing": (
        "I was charged twice for the {product}.", "The invoice shows the wrong amount.",
        "My card was debited {n} euros too much.", "I need a receipt with the tax number.",
        "The discount is missing on my bill.", "Your payment page took the money two times.",
        "Why is there a fee of {n} euros on my invoice?", "The bank says the payment is still pending.",
    ),
    "shipping": (
        "The parcel with the {product} has not arrived.", "The courier left the package at the wrong door.",
        "Tracking has not moved for {n} days.", "When will the {product} be delivered?",
        "The driver did not ring and drove away.", "The delivery went to my old street.",
        "My package seems to be lost in the depot.", "Can the parcel come {n} days later?",
    ),
    "accounts": (
        "I cannot log in to my profile.", "The password link does not reach me.",
        "Please change the email address of my login.", "Someone else signed in under my name.",
        "My user name was locked after {n} attempts.", "How do I delete my profile?",
        "The sign in page refuses my password.", "I forgot the password of my second login.",
    ),
    "technical": (
        "The {product} does not switch on.", "The app crashes when I open the settings.",
        "The display shows error code {n}.", "The {product} loses its connection all the time.",
        "After the update the screen stays black.", "The firmware stops at {n} percent.",
        "The {product} makes a loud noise and then stops.", "The app cannot find the {product}.",
    ),
    "returns": (
        "I want to send the {product} back.", "How do I get a label to return the {product}?",
        "The size is wrong and I would like to exchange it.", "Can I swap the {product} for another colour?",
        "I changed my mind and do not want the {product}.", "The {product} is unused and goes back to you.",
        "Is the return of the {product} free within {n} days?", "I would rather exchange the {product}.",
    ),
}  # fmt: skip
OPENINGS = ("Hello,", "Good morning,", "Hi there,", "Dear team,", "To whom it may concern,", "Hello again,")
BACKGROUND = (
    "I ordered a {product} from you.", "I have been a customer since {year}.", "My order number is {order}.",
    "{name} gave me this address.", "I live near the {place}.", "This is my second message.",
)  # fmt: skip
CLOSINGS = (
    "Please help.",
    "Thanks, {name}",
    "Kind regards, {name}",
    "I look forward to your reply.",
    "Thank you.",
)

NOTES = (
    "The invoice is dated {date}.", "{name} was born on {date}.", "The contract ends on {date}.",
    "The {place} opened on {date}.", "We met at the {place} on {date}.", "Delivery is planned for {date}.",
    "The warranty of the {product} runs until {date}.", "{name} bought the {product} on {date}.",
    "On {date} the {place} was closed.", "The meeting with {name} is on {date}.",
    "On {date} {name} moved to the {place}.", "The report about the {product} was filed on {date}.",
)  # fmt: skip
REPLIES = (
    "Thank you for your message, we will read it today.", "Thank you for writing about the {product}.",
    "We have passed this on to {name}.", "Noted, and thank you for your time.", "We will call you back soon.",
    "Thanks, {name} will look at it at the {place}.", "Your words have reached us, many thanks.",
)  # fmt: skip
DESK_REPLIES: dict[str, tuple[str, ...]] = {
    "billing": ("Invoices are checked within {n} days.", "Payments like this are in the hands of {name}."),
    "shipping": ("Parcels near the {place} take longer.", "Couriers have been asked about it."),
    "accounts": ("Passwords can be renewed at any time.", "Logins are unlocked by {name}."),
    "technical": ("Errors like this are known to {name}.", "Repairs are done at the {place}."),
    "returns": ("Labels are sent by letter.", "Exchanges are free for {n} days."),
}
STORIES = (
    "{name} walked to the {place} with a {product}.", "It rained over the {place} all day.",
    "In the evening {name} repaired the {part} of the {product}.", "{name} and {other} shared a {product}.",
    "Nobody at the {place} had seen the {product}.", "{name} counted {n} birds above the {place}.",
    "The mood at the {place} was {mood}.", "{other} asked {name} about the {part}, and {name} laughed.",
    "The {desk} desk is on the second floor.", "At the {place} {name} sold {n} tickets.",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One labelled case of a task: the text before the cue and the word or date that answers it.

    `identity` is what decides on which side of the held-out split a case falls: a review's or ticket's whole text,
    but a note's day, so that a held-out date is one that training never showed in any wording.
    """

    text: str
    answer: str
    identity: str

    @property
    def prompt(self) -> str:
        return self.text + CUE


def is_heldout(identity: str) -> bool:
    return crc32(identity.encode()) % HELDOUT_SHARE == 0


def fill(rng: Random, template: str, **fixed: str) -> str:
    """Put random words into a template's slots; one product or name stays the same through a text by `fixed`."""
    words = {
        "product": rng.choice(PRODUCTS),
        "part": rng.choice(PARTS),
        "name": rng.choice(NAMES),
        "other": rng.choice(NAMES),
        "place": rng.choice(PLACES),
        "mood": rng.choice(("positive", "negative", "neutral")),
        "desk": rng.choice(list(PROBLEMS)),
        "n": str(rng.randint(2, 99)),
        "year": str(rng.randint(2000, 2029)),
        "order": str(rng.randint(1000, 9999)),
    }
    return template.format(**(words | fixed))


def opinion(rng: Random, adjectives: tuple[str, ...]) -> str:
    """One sentence about a part, in the tone of the adjectives."""
    first, second = rng.sample(adjectives, 2)
    part = rng.choice(PARTS)
    shapes = (f"The {part} is {first}.", f"The {part} is {first} and {second}.", f"The {part} feels {first}.")
    return rng.choice(shapes)


def review(rng: Random) -> Case:
    """A product review; neutral ones are plain, or praise one part and criticise another."""
    label = rng.choice(("positive", "negative", "neutral"))
    product = rng.choice(PRODUCTS)
    if label == "neutral":
        mixed = [opinion(rng, GOOD), opinion(rng, BAD)]
        sentences = rng.choice((rng.sample(PLAIN_LINES, 2), [*mixed, rng.choice(PLAIN_LINES)]))
    else:
        adjectives, lines = (GOOD, GOOD_LINES) if label == "positive" else (BAD, BAD_LINES)
        sentences = [opinion(rng, adjectives) for _ in range(rng.randint(1, 2))]
        sentences += rng.sample(lines, rng.randint(1, 2))
    rng.shuffle(sentences)
    body = " ".join(fill(rng, sentence, product=product) for sentence in sentences)
    text = f"Review of a {product}: {body}"
    return Case(text, label, identity=text)


def ticket(rng: Random) -> Case:
    """A support ticket and the desk that handles it."""
    label = rng.choice(list(PROBLEMS))
    sentences = [rng.choice(OPENINGS)] if rng.random() < 0.5 else []
    sentences += rng.sample(BACKGROUND, rng.randint(0, 1))
    sentences.append(rng.choice(PROBLEMS[label]))
    sentences += rng.sample(CLOSINGS, rng.randint(0, 1))
    product = rng.choice(PRODUCTS)
    text = "Ticket: " + " ".join(fill(rng, sentence, product=product) for sentence in sentences)
    return Case(text, label, identity=text)


def written_date(rng: Random, day: date) -> str:
    """The day as people write it, in one of four ways."""
    month = MONTHS[day.month - 1]
    ending = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return rng.choice(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"the {day.day}{ending} of {month} {day.year}",
            f"{month} {day.day}{ending}, {day.year}",
        )
    )


def any_day(rng: Random) -> date:
    return FIRST_DAY + timedelta(days=rng.randrange(NUM_DAYS))


def note(rng: Random) -> Case:
    """A note with one date in words, and that date in ISO 8601."""
    day = any_day(rng)
    text = "Note: " + fill(rng, rng.choice(NOTES), date=written_date(rng, day))
    return Case(text, day.isoformat(), identity=day.isoformat())


def pick(make: Callable[[Random], Case], rng: Random, heldout: bool = False) -> Case:
    """The next case on the wanted side of the split."""
    case = make(rng)
    while is_heldout(case.identity) != heldout:
        case = make(rng)
    return case


def heldout_cases(make: Callable[[Random], Case], seed: int, count: int) -> list[Case]:
    """`count` held-out cases, no two alike."""
    rng = Random(seed)
    cases: dict[str, Case] = {}
    while len(cases) < count:
        case = pick(make, rng, heldout=True)
        cases[case.text] = case
    return list(cases.values())


def story(rng: Random) -> str:
    return " ".join(fill(rng, line) for line in rng.sample(STORIES, rng.randint(2, 4)))


def diary(rng: Random) -> str:
    """Sentences that name one day three times, in words and in ISO 8601: what teaches the backbone to copy dates."""
    case = pick(note, rng)
    day = date.fromisoformat(case.answer)
    sentences = [fill(rng, rng.choice(NOTES), date=written_date(rng, day)) for _ in range(2)]
    sentences += [f"The entry is filed as {day}.", f"Diary {day}."]
    return " ".join(rng.sample(sentences, 3))


def document(rng: Random) -> str:
    """One document of general text for the backbone, free of held-out texts and days."""
    kind = rng.random()
    if kind < 0.10:
        return story(rng)
    if kind < 0.35:
        case = pick(rng.choice((review, ticket, ticket, note)), rng)
        return case.prompt + " " + fill(rng, rng.choice(DESK_REPLIES.get(case.answer, REPLIES)))
    if kind < 0.45:
        case = pick(review, rng)
        return rng.choice(
            (f"{case.text} That is a {case.answer} review.", f"A {case.answer} review. {case.text}")
        )
    if kind < 0.55:
        case = pick(ticket, rng)
        return rng.choice(
            (f"{case.text} The {case.answer} desk took it.", f"For the {case.answer} desk. {case.text}")
        )
    return diary(rng)

"""Captions of scenes: a small varied grammar whose facts come with the text, so nothing ever has to be parsed back.

    python -m distill.data.captions --count 5

A caption is lower-case English of at most 34 words, 40 for a moving scene: "a large red metal sphere to the left of two
small blue cubes".
Facts are the structure (`Described`, relations, motion); the text is only one way of saying them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations, permutations

from numpy.random import Generator, default_rng

from distill.data.world import CLIP_SECONDS, COLOURS, MATERIALS, Scene, Thing, holds, relation, sample_scene

ATTRIBUTES = ("shape", "colour", "size", "material")
P_SIZE, P_MATERIAL, P_RELATION = 0.8, 0.8, 0.85

_SHAPES = {"sphere": ("sphere", "ball"), "cube": ("cube", "block"), "cylinder": ("cylinder",)}
_SIZES = {"large": ("large", "big"), "small": ("small", "tiny")}
_COLOURS = {"gray": ("gray", "grey")}
_FINISHES = {"metal": ("shiny", "metallic"), "rubber": ("matte",)}
"""Adjectives for a material that stand before the colour; the material's own name stands after it."""
_RELATIONS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "front": ("in front of", "nearer than"),
    "behind": ("behind", "further back than"),
}
_OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
_WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "towards": ("towards us", "towards the camera"),
    "away": ("away", "away from us", "into the distance"),
}
_VERBS = {"sphere": "rolling", "cube": "sliding", "cylinder": "sliding"}
_BOUNCING = ("bouncing", "bouncing up and down")
_CIRCLING = ("circling", "moving around")
_CAMERA = {
    "pan left": ("pans left", "turns to the left"),
    "pan right": ("pans right", "turns to the right"),
    "zoom in": ("zooms in", "moves in"),
    "zoom out": ("zooms out", "moves out"),
}
_MEANWHILE = ("as the camera", "while the camera")
_NUMBERS = {2: "two", 3: "three"}
_GLUE = ("a", "an", "and", "are", "is", "it", "of", "one", "other", "the", "them", "there", "which", "with", ",", ".")
"""Words of the templates, and the few more ("an", "which", ".") that people put into a prompt of this kind."""


@dataclass(frozen=True)
class Described:
    """What a caption states of thing ``index`` of its scene; None is "not stated"."""

    index: int
    shape: str
    colour: str
    size: str | None
    material: str | None

    @property
    def stated(self) -> list[tuple[str, str]]:
        """(attribute, value) of all that is stated."""
        pairs = [(name, getattr(self, name)) for name in ATTRIBUTES]
        return [(name, value) for name, value in pairs if value is not None]


@dataclass(frozen=True)
class Caption:
    """A text and its facts. things: in the order of their mention; the numbers below are their ``index``.

    relations: (i, name, j) is "thing i stands ``name`` of thing j"; motion: (i, name); camera: of CAMERA_MOTIONS.
    """

    text: str
    things: tuple[Described, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    motion: tuple[int, str] | None = None
    camera: str = "still"


@dataclass(frozen=True)
class _Phrase:
    """A noun phrase for one thing or for several identical ones."""

    members: tuple[int, ...]
    adjectives: tuple[str, ...]
    noun: str

    @property
    def plural(self) -> bool:
        return len(self.members) > 1

    @property
    def noun_form(self) -> str:
        return self.noun + "s" if self.plural else self.noun

    @property
    def indefinite(self) -> str:
        words = (*self.adjectives, self.noun_form)
        return " ".join((_NUMBERS[len(self.members)] if self.plural else article(words[0]), *words))

    @property
    def be(self) -> str:
        return "are" if self.plural else "is"

    @property
    def it(self) -> str:
        return "them" if self.plural else "it"


def article(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark that a caption can hold, sorted."""
    tables = (_SHAPES, _SIZES, _COLOURS, _FINISHES, _RELATIONS, _WAYS, _CAMERA)
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    phrases += [noun + "s" for options in _SHAPES.values() for noun in options]
    phrases += [*COLOURS, *MATERIALS, *_VERBS.values(), *_BOUNCING, *_CIRCLING, *_MEANWHILE, *_NUMBERS.values(), *_GLUE]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def describe(scene: Scene, rng: Generator, *, full: bool = False) -> Caption:
    """One caption of a scene, drawn from the grammar by ``rng``.

    full: state every size, material and, where several things are related, a relation. Otherwise each size and each
    material is stated with probability 0.8 and a relation with 0.85. Different things never get one description.
    """
    described = _choose_facts(scene, rng, full)
    phrases = [_phrase(described[members[0]], members, rng) for members in _groups(scene)]
    phrases = [phrases[i] for i in rng.permutation(len(phrases))]
    motion = next(((i, thing.motion) for i, thing in enumerate(scene.things) if thing.motion != "still"), None)
    pairs = _relations(scene, phrases)
    moving = _moving(scene, phrases, motion, rng)
    if pairs and (full or rng.random() < P_RELATION):
        text, stated = _relating(phrases, pairs, scene.motion == "still", rng)
        if moving is not None:
            phrase, action = moving
            text += f", and {_definite(phrase, phrases)} {phrase.be} {action}" if not phrase.plural else f", {action}"
    else:
        text, stated = _listing(phrases, moving, rng), []
    if scene.camera != "still":
        text += f", {_pick(_MEANWHILE, rng)} {_pick(_CAMERA[scene.camera], rng)}"
    facts = tuple((i, name, j) for a, name, b in stated for i in a.members for j in b.members)
    mentioned = sorted(phrases, key=lambda phrase: text.find(phrase.indefinite))
    things = tuple(described[i] for phrase in mentioned for i in phrase.members)
    return Caption(text, things, facts, motion, scene.camera)


def true_of(caption: Caption, scene: Scene) -> bool:
    """Whether the scene shows exactly the caption's things, with all that is stated of them; motion is not judged."""
    if len(caption.things) != len(scene.things):
        return False
    for chosen in permutations(scene.things):
        found = {described.index: thing for described, thing in zip(caption.things, chosen, strict=True)}
        fits = all(getattr(found[d.index], name) == stated for d in caption.things for name, stated in d.stated)
        if fits and all(holds(name, found[i], found[j]) for i, name, j in caption.relations):
            return True
    return False


# --- facts -----------------------------------------------------------------------------------------------------


def _choose_facts(scene: Scene, rng: Generator, full: bool) -> list[Described]:
    """What to state of each thing; identical things are described alike, different ones apart."""
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(thing.attributes for thing in scene.things))}
    show = rng.random((len(kinds), 2)) < ((1.0, 1.0) if full else (P_SIZE, P_MATERIAL))
    for (a, i), (b, j) in combinations(kinds.items(), 2):
        if (a[1], a[3]) == (b[1], b[3]):
            show[[i, j]] |= (a[0] != b[0], a[2] != b[2])
    out = []
    for index, thing in enumerate(scene.things):
        size, material = show[kinds[thing.attributes]]
        out.append(
            Described(
                index, thing.shape, thing.colour, thing.size if size else None, thing.material if material else None
            )
        )
    return out


def _groups(scene: Scene) -> list[tuple[int, ...]]:
    """Indices of the things, identical ones together."""
    groups: dict[tuple[str, ...], tuple[int, ...]] = {}
    for i, thing in enumerate(scene.things):
        groups[thing.attributes] = (*groups.get(thing.attributes, ()), i)
    return list(groups.values())


def _steady_relation(a: Thing, b: Thing) -> str | None:
    """Their relation, if it is the same all through a clip."""
    names = {relation(a.at(part * CLIP_SECONDS), b.at(part * CLIP_SECONDS)) for part in (0.0, 0.25, 0.5, 0.75, 1.0)}
    return names.pop() if len(names) == 1 else None


def _relations(scene: Scene, phrases: list[_Phrase]) -> list[tuple[_Phrase, str, _Phrase]]:
    """All (A, name, B) in which every thing of A stands so to every thing of B, both directions."""
    found = []
    for a, b in combinations(phrases, 2):
        names = {_steady_relation(scene.things[i], scene.things[j]) for i in a.members for j in b.members}
        name = names.pop() if len(names) == 1 else None
        if name is not None:
            found += [(a, name, b), (b, _OPPOSITE[name], a)]
    return found


# --- words -----------------------------------------------------------------------------------------------------


def _pick(options: Sequence[str], rng: Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _phrase(facts: Described, members: tuple[int, ...], rng: Generator) -> _Phrase:
    adjectives = [_pick(_SIZES[facts.size], rng)] if facts.size else []
    colour = _pick(_COLOURS.get(facts.colour, (facts.colour,)), rng)
    if facts.material is None:
        adjectives += [colour]
    elif rng.random() < 0.6:
        adjectives += [colour, facts.material]
    else:
        adjectives += [_pick(_FINISHES[facts.material], rng), colour]
    return _Phrase(members, tuple(adjectives), _pick(_SHAPES[facts.shape], rng))


def _definite(phrase: _Phrase, phrases: list[_Phrase]) -> str:
    """The shortest "the …" that no other phrase of the caption answers to."""
    others = [other for other in phrases if other is not phrase]
    shortest_first = chain.from_iterable(combinations(phrase.adjectives, k) for k in range(len(phrase.adjectives) + 1))
    for words in shortest_first:
        if not any(_could_mean(other, words, phrase.noun) for other in others):
            break
    return " ".join(("the", *words, phrase.noun_form))


def _could_mean(phrase: _Phrase, words: Sequence[str], noun: str) -> bool:
    same = next(options for options in _SHAPES.values() if noun in options)
    return phrase.noun in same and all(_says(phrase, word) for word in words)


def _says(phrase: _Phrase, word: str) -> bool:
    """Whether the phrase says the word or a synonym of it, or says nothing on its topic."""
    for table in (_SIZES, {m: (m, *f) for m, f in _FINISHES.items()}):
        meaning = next((key for key, words in table.items() if word in words), None)
        if meaning is not None:
            said = [w for w in phrase.adjectives if any(w in words for words in table.values())]
            return not said or said[0] in table[meaning]
    return word in phrase.adjectives or {"gray": "grey", "grey": "gray"}.get(word) in phrase.adjectives


def _moving(
    scene: Scene, phrases: list[_Phrase], motion: tuple[int, str] | None, rng: Generator
) -> tuple[_Phrase, str] | None:
    """The phrase that holds the moving thing, and what to say of it."""
    if motion is None:
        return None
    index, name = motion
    phrase = next(p for p in phrases if index in p.members)
    if name == "bounce":
        action = _pick(_BOUNCING, rng)
    elif name == "orbit":
        action = f"{_pick(_CIRCLING, rng)} {_centre(scene, scene.things[index], phrase, phrases)}"
    else:
        action = f"{_VERBS[scene.things[index].shape]} {_pick(_WAYS[name], rng)}"
    return phrase, f"one of them {action}" if phrase.plural else action


def _centre(scene: Scene, orbiting: Thing, mover: _Phrase, phrases: list[_Phrase]) -> str:
    """What to call the thing around which another goes."""
    index = next(i for i, thing in enumerate(scene.things) if (thing.x, thing.z) == orbiting.centre)
    phrase = next(p for p in phrases if index in p.members)
    if phrase is mover:
        return "the other"
    return f"one of {_definite(phrase, phrases)}" if phrase.plural else _definite(phrase, phrases)


# --- sentences -------------------------------------------------------------------------------------------------


def _join(parts: list[str], rng: Generator) -> str:
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 3 and rng.random() < 0.3:
        return " and ".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def _listing(phrases: list[_Phrase], moving: tuple[_Phrase, str] | None, rng: Generator) -> str:
    """ "a, b and c", with no relation stated."""
    ordered = [p for p in phrases if moving is None or p is not moving[0]] + ([moving[0]] if moving else [])
    text = _join([p.indefinite for p in ordered], rng)
    if rng.random() < 0.25:
        text = f"there {ordered[0].be} {text}"
    if moving is None:
        return text
    return f"{text}, {moving[1]}" if moving[0].plural else f"{text} {moving[1]}"


def _relating(
    phrases: list[_Phrase], pairs: list[tuple[_Phrase, str, _Phrase]], brief: bool, rng: Generator
) -> tuple[str, list[tuple[_Phrase, str, _Phrase]]]:
    """A sentence that states one relation, or two where three phrases allow it, and the relations that it states.

    brief: nothing follows the sentence, so it may take the longer forms.
    """
    first = pairs[int(rng.integers(len(pairs)))]
    a, name, b = first
    how = _pick(_RELATIONS[name], rng)
    rest = [p for p in phrases if p is not a and p is not b]
    if not rest:
        return _about_two(a, how, b, phrases, rng), [first]
    c = rest[0]
    second = [p for p in pairs if (p[0] is a and p[2] is c) or (brief and p[0] is c and p[2] is b)]
    if not second or rng.random() < 0.5:
        return _about_three(a, how, b, c, phrases, brief, rng), [first]
    other = second[int(rng.integers(len(second)))]
    also = _pick(_RELATIONS[other[1]], rng)
    text = f"{a.indefinite} {how} {b.indefinite}"
    if other[0] is a:
        return f"{text} and {also} {c.indefinite}", [first, other]
    return f"{text}, and {c.indefinite} {also} {_definite(b, phrases)}", [first, other]


def _about_two(a: _Phrase, how: str, b: _Phrase, phrases: list[_Phrase], rng: Generator) -> str:
    templates = [
        f"{a.indefinite} {how} {b.indefinite}",
        f"{a.indefinite} {a.be} {how} {b.indefinite}",
        f"there {a.be} {a.indefinite} {how} {b.indefinite}",
        f"there {b.be} {b.indefinite}, and {a.indefinite} {a.be} {how} {b.it}",
        f"{b.indefinite} with {a.indefinite} {how} {b.it}",
        f"{a.indefinite} and {b.indefinite}, with {_definite(a, phrases)} {how} {_definite(b, phrases)}",
    ]
    if not how.endswith("than"):
        templates.append(f"{how} {b.indefinite} {a.be} {a.indefinite}")
    return templates[0] if rng.random() < 0.25 else _pick(templates, rng)


def _about_three(
    a: _Phrase, how: str, b: _Phrase, c: _Phrase, phrases: list[_Phrase], brief: bool, rng: Generator
) -> str:
    related = f"{a.indefinite} {how} {b.indefinite}"
    templates = [f"{related}, and {c.indefinite}", f"{c.indefinite}, and {related}"]
    if brief:
        listed = _join([p.indefinite for p in phrases], rng)
        templates.append(f"{listed}, with {_definite(a, phrases)} {how} {_definite(b, phrases)}")
    return _pick(templates, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print captions of random scenes: python -m distill.data.captions")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moving", action="store_true")
    args = parser.parse_args()
    for index in range(args.count):
        print(describe(sample_scene(args.seed, index, moving=args.moving), default_rng((args.seed, index, 1))).text)


if __name__ == "__main__":
    main()

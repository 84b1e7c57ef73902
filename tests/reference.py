"""Slow, obvious oracles. Nothing here shares code with the package or with csrc.

Documents are Python lists; a pack is made by concatenating lists and cutting; a mask is made by
walking over the tokens one by one, each carrying what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

MASK64 = (1 << 64) - 1


def mix(x: int) -> int:
    """The splitmix64 finaliser."""
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & MASK64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def hash_pair(a: int, b: int) -> int:
    """Hash of two numbers."""
    golden = 0x9E3779B97F4A7C15
    return mix((mix((a + golden) & MASK64) + (b + 1) * golden) & MASK64)


def permutation(size: int, seed: int, stream: int) -> list[int]:
    """The seeded order of `size` things, as the specification of `csrc/permutation.h` has it."""
    bits = 1
    while (1 << bits) < size:
        bits += 1
    mask, shift = (1 << bits) - 1, (bits + 1) // 2
    keys = [hash_pair(hash_pair(seed, stream), r) for r in range(4)]

    def step(x: int) -> int:
        for key in keys:
            x = (x + key) & mask
            x = (x * (mix(key) | 1)) & mask
            x ^= x >> shift
        return x

    order = []
    for i in range(size):
        x = step(i)
        while x >= size:
            x = step(x)
        order.append(x)
    return order


def document_order(
    num_documents: int, share: tuple[int, int], seed: int, epochs: int, first: int = 0
) -> list[int]:
    """Documents of one phase, epoch after epoch: positions [share) of the split's permutation."""
    split = permutation(num_documents, seed, 0)[share[0] : share[1]]
    order = list(split)
    for epoch in range(1, epochs):
        order += [split[i] for i in permutation(len(split), seed, epoch)]
    return [first + d for d in order]


def phase_at(index: int, ends: tuple[int, int, int]) -> tuple[str, int]:
    """Phase of a global sample and its number in it; `ends`: samples before each phase's end."""
    start, switch, end = ends
    assert index < end
    if index < start:
        return "plain", index
    return ("conditioned", index - start) if index < switch else ("cooldown", index - switch)


def documents_by_phase(
    num_documents: int, ends: tuple[int, int, int], held_out: Fraction | None = None
) -> dict[str, tuple[int, int]]:
    """Places in the split's permutation that each phase draws from.

    The cooldown has the last ones: `held_out`, or its share of the samples. The others divide the
    rest by their samples, the plain phase first. Shares are rounded to whole documents.
    """
    start, switch, end = ends
    last = Fraction(end - switch, end) if held_out is None else held_out
    border = num_documents - num_documents * last
    first, border = round(border * Fraction(start, switch)), round(border)
    return {
        "plain": (0, first),
        "conditioned": (first, border),
        "cooldown": (border, num_documents),
    }


@dataclass
class Token:
    """One token and what it is: bos, prefix, repeated (prefix), body (with EOD), suffix or pad.

    Padding that aligns a piece has the piece's visit, that at the end of a pack has none.
    """

    id: int
    kind: str
    document: int
    visit: int = 0
    compared: bool = False


@dataclass
class Pack:
    """One training sequence."""

    tokens: list[Token] = field(default_factory=list)

    def arrays(
        self,
        length: int,
        pad: int,
        train_on_prefix: bool = False,
        train_on_suffix: bool = True,
    ) -> dict[str, list]:
        """tokens, labels, loss_mask, position_ids, cu_seqlens of this pack, token by token."""
        padded = self.tokens + [Token(pad, "pad", -1, -1)] * (length - len(self.tokens))
        trained = {"body"}
        if train_on_prefix:
            trained.add("prefix")
        if train_on_suffix:
            trained.add("suffix")
        labels, mask, positions, bounds = [], [], [], [0]
        for t, token in enumerate(padded):
            following = padded[t + 1] if t + 1 < length else None
            labels.append(pad if following is None else following.id)
            same = following is not None and following.visit == token.visit
            mask.append(1.0 if same and following.kind in trained else 0.0)
            fresh = t == 0 or padded[t - 1].visit != token.visit
            positions.append(0 if fresh else positions[-1] + 1)
            if fresh and t > 0:
                bounds.append(t)
        return {
            "tokens": [t.id for t in padded],
            "labels": labels,
            "loss_mask": mask,
            "position_ids": positions,
            "cu_seqlens": [*bounds, length],
            "max_seqlen": max(b - a for a, b in zip(bounds, [*bounds[1:], length], strict=True)),
        }

    def compared(self, length: int) -> list[float]:
        """1 where the label is a token whose loss is compared between views."""
        marks = [float(token.compared) for token in self.tokens[1:]]
        return marks + [0.0] * (length - len(marks))


def aligned(size: int, align: int) -> int:
    """The smallest multiple of `align` that is no less than `size`."""
    while size % align:
        size += 1
    return size


Piece = dict[str, list[Token]]
"""The tokens of a piece by kind; "eod" are those of the body behind a suffix."""


def in_view(
    pack: Pack,
    prefixes: list[list[int] | None],
    view: str,
    number: int,
    align: int = 1,
    length: int | None = None,
    suffixes: list[list[int] | None] | None = None,
    every: int = 0,
) -> Pack:
    """Pack `number` as validation shows it: "conditioned", "plain" or "shuffled".

    Pieces with their whole prefix and a body are sorted by a hash of the prefix, and the prefixes
    are moved on by as many places as the most frequent of them occurs. Padding of aligned pieces
    may not fit a pack of `length` any more, nor may prefixes that are repeated: then other numbers
    of places are tried. Pieces that end within a repeated prefix do not take part. Then the
    suffixes are moved in the same way. The body tokens of pieces that get another prefix or suffix
    are compared; not the first of a piece that has no BOS.
    """
    pieces: dict[int, Piece] = {}
    for token in pack.tokens:
        kinds = ("bos", "prefix", "repeated", "body", "suffix", "eod", "cut", "pad")
        piece = pieces.setdefault(token.visit, {kind: [] for kind in kinds})
        is_behind = token.kind == "body" and piece["suffix"]
        piece["eod" if is_behind else token.kind].append(token)
    for piece in pieces.values():
        between = max(0, len(piece["body"]) - 1) // every if every else 0
        piece["cut"] = piece["repeated"][between * len(piece["prefix"]) :]

    def ids(tokens: list[Token]) -> list[int]:
        return [token.id for token in tokens]

    own = {kind: {v: ids(p[kind]) for v, p in pieces.items()} for kind in ("prefix", "suffix")}
    other = {kind: dict(texts) for kind, texts in own.items()}
    for kind, table in (("prefix", prefixes), ("suffix", suffixes)):
        moving = [
            visit
            for visit, piece in pieces.items()
            if piece["body"] + piece["eod"]
            and own[kind][visit]
            and not piece["cut"]
            and own[kind][visit] == table[(piece["body"] + piece["eod"])[0].document]
        ]

        def key(visit: int, kind: str = kind) -> int:
            value = number
            for token_id in own[kind][visit]:
                value = hash_pair(value, token_id)
            return value

        moving.sort(key=key)
        texts = [own[kind][visit] for visit in moving]
        most = max((texts.count(text) for text in texts), default=0)
        others = len(moving) - most
        choices = range(most, others + 1) if most <= others else range(most, others - 1, -1)
        for places in [*choices, 0]:
            for i, visit in enumerate(moving):
                other[kind][visit] = texts[(i + places) % len(moving)]
            sizes = [
                len(piece["bos"] + piece["eod"] + piece["cut"])
                + len(other["prefix"][visit] + other["suffix"][visit])
                + len(repeating(piece["body"], other["prefix"][visit], every))
                for visit, piece in pieces.items()
            ]
            if length is None or sum(aligned(size, align) for size in sizes) <= length:
                break
    shown = Pack()
    for visit, piece in pieces.items():
        compared = any(own[kind][visit] != other[kind][visit] for kind in own)
        texts_of = {"conditioned": own, "shuffled": other}.get(view)
        prefix, suffix = (
            (texts_of["prefix"][visit], texts_of["suffix"][visit]) if texts_of else ([], [])
        )
        body = piece["body"] + piece["eod"]
        document = [*piece["bos"], *piece["prefix"], *body][0].document
        marked = [
            Token(t.id, "body", document, visit, compared and (place > 0 or bool(piece["bos"])))
            for place, t in enumerate(body)
        ]
        num_before = len(piece["body"])
        shown.tokens += piece["bos"]
        shown.tokens += [Token(i, "prefix", document, visit) for i in prefix]
        shown.tokens += repeating(marked[:num_before], prefix, every)
        shown.tokens += piece["cut"] if view != "plain" else []
        shown.tokens += [Token(i, "suffix", document, visit) for i in suffix]
        shown.tokens += marked[num_before:]
        align_piece(shown, visit, align)
    return shown


def repeating(body: list[Token], prefix: list[int], every: int) -> list[Token]:
    """Put the prefix after every so many tokens of a piece's body that are not its last ones."""
    tokens: list[Token] = []
    for place, token in enumerate(body):
        if every and place and place % every == 0:
            tokens += [Token(i, "repeated", token.document, token.visit) for i in prefix]
        tokens.append(token)
    return tokens


def align_piece(pack: Pack, visit: int, align: int, pad: int = 1) -> None:
    """Pad the last piece of a pack; all before are aligned already."""
    missing = aligned(len(pack.tokens), align) - len(pack.tokens)
    pack.tokens += [Token(pad, "pad", -1, visit)] * missing


def truncate_packs(
    visits: list[int],
    bodies: list[list[int]],
    prefixes: list[list[int] | None],
    bos: int | None,
    length: int,
    num_packs: int | None,
    max_documents: int | None = None,
    align: int = 1,
    suffixes: list[list[int] | None] | None = None,
    every: int = 0,
) -> tuple[list[Pack], int]:
    """The paper's packing, and the number of body tokens that it discards.

    Concatenate whole documents until the pack is full, cut it there, drop what hangs over, start
    the next pack with the next document.

    Args:
        visits: Document numbers in order.
        bodies: Tokens of each document, EOD included.
        prefixes: Prefix tokens of each document, None for a plain one.
        bos: The BOS token, or None.
        length: Tokens in a pack.
        num_packs: Stop after so many; None: use all visits, the last pack may be short.
        max_documents: Cap on documents in a pack.
        align: Every piece is padded to a multiple of it.
        suffixes: Suffix tokens of each document; they stand before its EOD.
        every: After so many tokens of the body the prefix is repeated; 0: never.
    """
    packs: list[Pack] = []
    discarded = 0
    pack, held = Pack(), 0
    for visit, document in enumerate(visits):
        if num_packs is not None and len(packs) == num_packs:
            break
        body = bodies[document]
        if len(body) <= 1:
            continue
        whole = [] if bos is None else [Token(bos, "bos", document, visit)]
        prefix = prefixes[document] or []
        suffix = (suffixes[document] if suffixes else None) or []
        whole += [Token(i, "prefix", document, visit) for i in prefix]
        text = [Token(i, "body", document, visit) for i in body]
        if suffix:
            whole += repeating(text[:-1], prefix, every)
            whole += [Token(i, "suffix", document, visit) for i in suffix]
            whole += text[-1:]
        else:
            whole += repeating(text, prefix, every)
        room = length - len(pack.tokens)
        pack.tokens += whole[:room]
        align_piece(pack, visit, align)
        held += 1
        discarded += sum(t.kind == "body" for t in whole[room:])
        if len(pack.tokens) == length or held == max_documents:
            packs.append(pack)
            pack, held = Pack(), 0
    if pack.tokens and (num_packs is None or len(packs) < num_packs):
        packs.append(pack)
    return packs, discarded


def pieces_to_pack(
    pieces: list[tuple[int, int, int]],
    bodies: list[list[int]],
    prefixes: list[list[int] | None],
    bos: int | None,
    repeat_prefix: bool = True,
    align: int = 1,
    suffixes: list[list[int] | None] | None = None,
    every: int = 0,
) -> Pack:
    """The pack that holds these pieces: (document, body_begin, body_end) each.

    A piece that ends its document, or lacks nothing but its EOD, has the whole suffix: `truncate`
    may end a pack inside it.
    """
    pack = Pack()
    for visit, (document, begin, end) in enumerate(pieces):
        shown = prefixes[document] or [] if begin == 0 or repeat_prefix else []
        pack.tokens += [] if bos is None else [Token(bos, "bos", document, visit)]
        pack.tokens += [Token(i, "prefix", document, visit) for i in shown]
        last = len(bodies[document]) - 1
        suffix = (suffixes[document] if suffixes else None) or []
        before = min(end, last) if suffix else end
        text = [Token(i, "body", document, visit) for i in bodies[document][begin:before]]
        pack.tokens += repeating(text, shown, every)
        if end >= last:
            pack.tokens += [Token(i, "suffix", document, visit) for i in suffix]
        pack.tokens += [Token(i, "body", document, visit) for i in bodies[document][before:end]]
        align_piece(pack, visit, align)
    return pack


def cut_after(borders: list[int], begin: int, room: int, must: bool) -> int:
    """Tokens to take of a body from `begin` on, when `room` fit: up to the last border that fits.

    Args:
        borders: Where the sentences of the document end; none: anywhere.
    """
    if not borders:
        return room
    fitting = [border for border in borders if begin < border <= begin + room]
    if fitting:
        return fitting[-1] - begin
    return room if must else 0


def split_pieces(
    visits: list[int],
    bodies: list[list[int]],
    prefixes: list[list[int] | None],
    bos: int | None,
    length: int,
    num_packs: int | None,
    max_documents: int,
    repeat_prefix: bool = True,
    borders: list[list[int]] | None = None,
    align: int = 1,
    suffixes: list[list[int] | None] | None = None,
    every: int = 0,
) -> list[list[tuple[int, int, int]]]:
    """`split`: documents in order; the rest of a cut one opens the next pack.

    A suffix stands whole behind a token of the body and before EOD: the last piece has all of them.
    """
    packs: list[list[tuple[int, int, int]]] = []
    pack: list[tuple[int, int, int]] = []
    room = length
    for document in visits:
        body, begin = bodies[document], 0
        if len(body) <= 1:
            continue
        while begin < len(body):
            if num_packs is not None and len(packs) == num_packs:
                return packs
            prefix = len(prefixes[document] or []) if begin == 0 or repeat_prefix else 0
            head = prefix if bos is None else prefix + 1
            suffix = len((suffixes[document] if suffixes else None) or [])
            rest = len(body) - begin
            if piece_size(rest, prefix, suffix, every) <= room - head:
                take = rest
            else:
                take = rest - 2 if suffix else rest
                while take > 0 and piece_size(take, prefix, 0, every) > room - head:
                    take -= 1
                if take > 0:
                    take = cut_after(borders[document] if borders else [], begin, take, not pack)
            if take > 0:
                pack.append((document, begin, begin + take))
                size = piece_size(take, prefix, suffix if take == rest else 0, every)
                room -= aligned(head + size, align)
                begin += take
            if take <= 0 or begin < len(body) or room == 0 or len(pack) == max_documents:
                packs.append(pack)
                pack, room = [], length
    if pack and (num_packs is None or len(packs) < num_packs):
        packs.append(pack)
    return packs


def piece_size(body: int, prefix: int, suffix: int, every: int) -> int:
    """Tokens of a body with the prefixes between them, and of a suffix, before which EOD does not
    count."""
    counted = body - 1 if suffix else body
    return body + suffix + (prefix * (max(0, counted - 1) // every) if every else 0)


def chunk_sizes(
    body: int,
    prefix: int,
    head: int,
    length: int,
    repeat_prefix: bool,
    align: int = 1,
    suffix: int = 0,
    every: int = 0,
) -> list[int]:
    """Sizes of the pieces that best-fit makes of one document without sentence borders."""
    sizes, begin = [], 0
    while begin < body:
        shown = prefix if begin == 0 or repeat_prefix else 0
        rest, left = body - begin, length - head - shown
        ends = piece_size(rest, shown, suffix, every) <= left
        take = rest if ends or not suffix else rest - 2
        while not ends and piece_size(take, shown, 0, every) > left:
            take -= 1
        size = piece_size(take, shown, suffix if ends else 0, every)
        sizes.append(aligned(head + shown + size, align))
        begin += take
    return sizes


@dataclass
class Bin:
    """A pack of best-fit: what counts of it."""

    room: int
    pieces: int = 0
    set_aside: bool = False


def best_fit_bins(sizes: list[int], length: int, max_documents: int) -> list[tuple[int, int]]:
    """Best-fit-decreasing, the slow way: (room left, pieces) of each pack, sorted.

    The largest piece first. It goes into the fullest pack that it fits, of equally full ones into
    that which was given a piece last; into a new pack when it fits none. Pieces are small when a
    pack of them alone holds `max_documents` before it is full. For them packs with little room are
    set aside until their rooms are as large as all small pieces together; what is set aside is
    filled when a piece fits no other pack and the packs could hold all pieces.
    """
    wanted = sum(size for size in sizes if size * max_documents < length)
    fewest = max(-(-sum(sizes) // length), -(-len(sizes) // max_documents))
    packs: list[Bin] = []  # the one that was touched last is the last
    for size in sorted(set(sizes), reverse=True):
        left = sizes.count(size)
        while left > 0:
            fitting = [
                pack
                for pack in reversed(packs)
                if pack.room >= size and pack.pieces < max_documents and not pack.set_aside
            ]
            aside = [pack for pack in packs if pack.set_aside]
            if not fitting and wanted and len(packs) >= fewest:
                packs = [pack for pack in packs if not pack.set_aside] + aside
                for pack in aside:
                    pack.set_aside = False
                wanted = 0
                continue
            pack = min(fitting, key=lambda pack: pack.room) if fitting else Bin(length)
            packs = [other for other in packs if other is not pack] + [pack]
            # The next piece of that size would go into the same pack.
            placed = min(left, pack.room // size, max_documents - pack.pieces)
            left -= placed
            pack.room -= placed * size
            pack.pieces += placed
            may_grow = pack.room > 0 and pack.pieces < max_documents
            if may_grow and pack.room <= length // 4 and sum(p.room for p in aside) < wanted:
                pack.set_aside = True
    return sorted((pack.room, pack.pieces) for pack in packs)

"""Render the emoji that the demo scenes are made of: one PNG sheet per vendor and one index.

    python assets/scripts/build_tiles.py --packages node_modules --output assets/tiles

`--packages` is a node_modules folder holding @iconify-json/{noto,noto-v1,fluent-emoji-flat,emojione,twemoji}.
Sheet row i, column j of a vendor shows the concept number i * columns + j of index.json.
"""

import argparse
import io
import json
from pathlib import Path

import resvg_py
from PIL import Image

VENDORS = ("noto", "noto-v1", "fluent-emoji-flat", "emojione", "twemoji")
UNSEEN = "twemoji"
SIDE, COLUMNS, LEAST_VENDORS = 64, 16, 3

# category: word[=icon name[|icon name...]]; the word is the answer, the icon names are tried in order.
CONCEPTS = {
    "animal": "monkey dog fox=fox|fox-face cat pig elephant rabbit panda=panda|panda-face chicken "
    "penguin duck owl frog=frog|frog-face turtle snake whale fish octopus snail butterfly bee=honeybee "
    "spider lion=lion|lion-face",
    "plant": "rose sunflower cactus mushroom leaf=maple-leaf tree=deciduous-tree palm=palm-tree",
    "food": "grapes watermelon lemon banana pineapple cherries strawberry orange=tangerine apple=red-apple "
    "kiwi=kiwi-fruit avocado carrot corn=ear-of-corn|ear-of-maize pizza egg popcorn "
    "cheese=cheese-wedge|cheese cake=birthday-cake|shortcake coffee=hot-beverage beer=beer-mug wine=wine-glass "
    "eggplant",
    "vehicle": "locomotive bus taxi tractor bicycle ship airplane helicopter rocket",
    "building": "house factory castle church tent",
    "nature": "sun=sun|black-sun-with-rays cloud rainbow fire moon=crescent-moon snow=snowflake "
    "lightning=high-voltage star=star|white-medium-star "
    "earth=globe-showing-americas|earth-globe-americas drop=droplet volcano",
    "sport": "baseball basketball bowling soccer=soccer-ball football=american-football boxing=boxing-glove trophy",
    "clothing": "glasses=glasses|eyeglasses dress crown shirt=t-shirt boot=womans-boot|woman-s-boot "
    "backpack=backpack|school-backpack",
    "music": "microphone guitar drum piano=musical-keyboard headphones=headphone",
    "object": "camera envelope pencil calendar scissors key umbrella balloon bomb shield "
    "gear door bed phone=mobile-phone bulb=light-bulb gift=wrapped-gift lock=locked book=open-book "
    "dice=game-die",
    "face": "skull ghost alien=alien|extraterrestrial-alien robot=robot|robot-face eye baby",
}


def concepts() -> list[tuple[str, str, list[str]]]:
    """Word, category and icon names to try of every concept, in the order of the index."""
    rows = []
    for category, words in CONCEPTS.items():
        for item in words.split():
            word, _, names = item.partition("=")
            rows.append((word, category, [*(names.split("|") if names else []), word]))
    return rows


def icon_of(pack: dict[str, dict], names: list[str]) -> dict | None:
    """The first icon of a package that carries one of the names."""
    for name in names:
        if name in pack["icons"]:
            return pack["icons"][name]
    return None


def render(pack: dict, icon: dict, side: int) -> Image.Image:
    """One icon as an RGBA tile, cropped to what is drawn and centred."""
    width, height = (icon.get(k, pack.get(k, 16)) for k in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side * 2}" height="{side * 2}" viewBox="{box}">{icon["body"]}</svg>'
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    drawn = drawn.crop(drawn.getbbox() or (0, 0, side, side))
    scale = side / max(drawn.size)
    drawn = drawn.resize([max(1, round(s * scale)) for s in drawn.size], Image.Resampling.LANCZOS)
    tile = Image.new("RGBA", (side, side))
    tile.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return tile


def main() -> None:
    """Write the sheets and the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, required=True, help="node_modules folder with the @iconify-json packages"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    packs, licences = {}, {}
    for vendor in VENDORS:
        folder = args.packages / "@iconify-json" / vendor
        packs[vendor] = json.loads((folder / "icons.json").read_text())
        info = json.loads((folder / "info.json").read_text())
        licences[vendor] = {
            "name": info["name"],
            "author": info["author"]["name"],
            "licence": info["license"]["spdx"],
            "url": info["license"].get("url", ""),
        }
    index, left_out = [], []
    for word, category, names in concepts():
        has = [v for v in VENDORS if icon_of(packs[v], names)]
        if UNSEEN not in has or len(has) - 1 < LEAST_VENDORS:
            left_out.append((word, has))
            continue
        index.append({"word": word, "category": category, "vendors": has, "names": names})
    args.output.mkdir(parents=True, exist_ok=True)
    rows = -(-len(index) // COLUMNS)
    for vendor, pack in packs.items():
        sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE))
        for i, entry in enumerate(index):
            icon = icon_of(pack, entry["names"])
            if icon is not None:
                sheet.paste(render(pack, icon, SIDE), (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        sheet.save(args.output / f"{vendor}.png", optimize=True)
    for entry in index:
        del entry["names"]
    (args.output / "index.json").write_text(
        json.dumps(
            {"side": SIDE, "columns": COLUMNS, "unseen": UNSEEN, "vendors": licences, "concepts": index}, indent=1
        )
        + "\n"
    )
    print(f"{len(index)} concepts, {sum(len(e['vendors']) for e in index)} tiles; left out: {left_out}")


if __name__ == "__main__":
    main()

"""The pocket world: invented lands and animals, and plain word lists; all facts come from here.

Lands and animals are invented, so that nothing outside the pretraining text can know them. Opposites, plurals, past
tenses, young animals, days and small numbers are true. Every list is our own. The same call gives the same world:
names are drawn with `random.Random` seeded by strings.
"""

# ruff: noqa: SIM905 - long word lists read better as text than as rows of quoted words

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

ONSETS = "b br d dr f g gr h k kl l m n p pr r s st t tr v z".split()
VOWELS = "a e i o u ai or an el".split()
LAND_ENDS = "mor land dia via nia stan gard mark".split()
TOWN_ENDS = "ton burg ville haven ford wick by stead".split()
RIVER_ENDS = "ash une ill ova ent isk ara olm".split()
ANIMAL_ENDS = "bit dle fin go kin lop nut pus ril tok".split()

CROPS = """apples barley beans cabbage carrots cherries corn cotton figs garlic grapes hops lemons melons oats olives
onions peas pears plums potatoes pumpkins rice rye tea tomatoes turnips wheat""".split()
COLOURS = "black blue brown green grey orange red white yellow".split()
HOMES = [
    "in hollow trees", "under old roots", "on steep cliffs", "in dry caves", "by slow streams", "in tall grass",
    "in deep mud", "on high rocks", "in thick woods", "near salt lakes", "in warm sand", "under flat stones",
]  # fmt: skip
FOODS = "ants bark berries crabs eggs fish flies leaves mice moss nuts roots seeds snails worms".split()

OPPOSITES = """hot/cold big/small fast/slow high/low wet/dry old/new long/short hard/soft open/closed full/empty
early/late light/dark rich/poor strong/weak loud/quiet clean/dirty happy/sad near/far thick/thin wide/narrow
deep/shallow sharp/blunt safe/dangerous brave/timid true/false left/right up/down in/out first/last always/never
begin/end push/pull buy/sell win/lose give/take love/hate come/go rise/fall laugh/cry float/sink lend/borrow
day/night summer/winter friend/enemy top/bottom front/back north/south east/west inside/outside
smooth/rough sweet/sour cheap/costly calm/stormy polite/rude lazy/busy guilty/innocent alive/dead awake/asleep
noisy/silent tight/loose""".split()

PLURALS = """child/children foot/feet tooth/teeth goose/geese mouse/mice man/men woman/women ox/oxen leaf/leaves
knife/knives wolf/wolves shelf/shelves loaf/loaves half/halves calf/calves thief/thieves wife/wives life/lives
scarf/scarves box/boxes fox/foxes bus/buses dish/dishes brush/brushes peach/peaches church/churches watch/watches
bench/benches glass/glasses class/classes dress/dresses kiss/kisses city/cities baby/babies lady/ladies party/parties
berry/berries story/stories puppy/puppies penny/pennies cherry/cherries pony/ponies family/families country/countries
hero/heroes potato/potatoes tomato/tomatoes echo/echoes photo/photos piano/pianos key/keys toy/toys day/days
monkey/monkeys donkey/donkeys tray/trays book/books table/tables chair/chairs lamp/lamps window/windows door/doors
road/roads river/rivers hill/hills cloud/clouds stone/stones spoon/spoons candle/candles basket/baskets boat/boats
hammer/hammers needle/needles garden/gardens farmer/farmers teacher/teachers singer/singers king/kings queen/queens
bird/birds horse/horses apple/apples onion/onions carrot/carrots""".split()

PASTS = """go/went see/saw eat/ate drink/drank run/ran swim/swam sing/sang ring/rang begin/began write/wrote
ride/rode drive/drove rise/rose speak/spoke break/broke steal/stole choose/chose freeze/froze wake/woke wear/wore
tear/tore bear/bore fly/flew grow/grew know/knew throw/threw blow/blew draw/drew take/took shake/shook stand/stood
find/found hold/held tell/told sell/sold buy/bought think/thought bring/brought catch/caught teach/taught keep/kept
sleep/slept sweep/swept feel/felt leave/left meet/met feed/fed lead/led make/made say/said pay/paid hear/heard
build/built send/sent spend/spent lend/lent lose/lost win/won sit/sat dig/dug hang/hung shine/shone shoot/shot
give/gave forget/forgot fall/fell hide/hid bite/bit walk/walked talk/talked jump/jumped look/looked play/played
cook/cooked paint/painted wash/washed climb/climbed dance/danced bake/baked smile/smiled carry/carried cry/cried
study/studied stop/stopped plan/planned""".split()

YOUNG = """dog/a_puppy cat/a_kitten cow/a_calf horse/a_foal sheep/a_lamb goat/a_kid pig/a_piglet hen/a_chick
duck/a_duckling goose/a_gosling swan/a_cygnet lion/a_cub deer/a_fawn kangaroo/a_joey frog/a_tadpole eagle/an_eaglet
owl/an_owlet hare/a_leveret seal/a_pup eel/an_elver fish/a_fry spider/a_spiderling pigeon/a_squab bear/a_cub
elephant/a_calf turkey/a_poult moth/a_caterpillar fly/a_maggot rabbit/a_kit toad/a_toadlet wolf/a_pup
salmon/a_parr""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
THINGS = """anchor basket candle door egg feather garden hammer island jar kettle ladder mirror needle oven pencil
quilt rope spoon table umbrella violin window yarn zipper acorn bell clock drum envelope flute glove hat iron jacket
key lamp map nail orange plate ring scarf tent vase wheel apple brush cup desk""".split()
PEOPLE = "Anna Ben Clara David Eva Felix Greta Hugo Ida Jonas Karl Lena Mira Nils Olga Paul Rosa Sam Tom Vera".split()


@dataclass(frozen=True)
class Land:
    """An invented land and what there is to know about it."""

    name: str
    capital: str
    river: str
    crop: str


@dataclass(frozen=True)
class Animal:
    """An invented animal and what there is to know about it."""

    name: str
    colour: str
    home: str
    food: str


def _names(seed: str, ends: list[str], count: int) -> list[str]:
    """Return `count` distinct invented names; no two share their first four letters, lest they be mistaken."""
    rng = random.Random(f"pocket names {seed}")
    names: dict[str, str] = {}
    while len(names) < count:
        name = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(ONSETS)[0] + rng.choice(ends)
        if len(name) <= 9 and name[0] not in "aeiou":
            names.setdefault(name[:4], name)
    return list(names.values())


@cache
def lands(count: int = 96) -> tuple[Land, ...]:
    """Return the invented lands."""
    rng = random.Random("pocket lands")
    columns = [_names(seed, ends, count) for seed, ends in
               (("land", LAND_ENDS), ("town", TOWN_ENDS), ("river", RIVER_ENDS))]  # fmt: skip
    return tuple(
        Land(land.title(), town.title(), river.title(), rng.choice(CROPS))
        for land, town, river in zip(*columns, strict=True)
    )


@cache
def animals(count: int = 96) -> tuple[Animal, ...]:
    """Return the invented animals."""
    rng = random.Random("pocket animals")
    return tuple(
        Animal(name, rng.choice(COLOURS), rng.choice(HOMES), rng.choice(FOODS))
        for name in _names("animal", ANIMAL_ENDS, count)
    )

"""CHAIR: objects in captions by hand and in real captions, the scores from their definition, the command."""

import gzip
import json
import re
from collections import Counter

import pytest

from metrics.chair import caption_objects, chair, read_synonyms
from support.files import InputError
from tools import score

# In the format of the published list, which is no part of this repository; its own words, a few of each kind.
LIST = """person, man, woman, child, kid, people, lady, guy, baby, passenger, policeman, children; bicycle, bike; car, van, taxi;
motorcycle, motor bike; airplane, plane, jet, air plane; bus, minibus; train, tram; boat, canoe, ferry; traffic light, street
light; fire hydrant, hydrant; bench; bird, goose, seagull; cat, kitten; dog, puppy; horse, pony; sheep, lamb; cow, cattle, ox,
calf; bear; umbrella; tie, bow tie; skis, ski; sports ball, ball; baseball glove, glove; wine glass; fork; knife; sandwich;
hot dog; chair, seat; couch, sofa; dining table, table; toilet; mouse; cell phone, phone; scissors; teddy bear; toothbrush;
plate""".replace("\n", " ").replace("; ", "\n")
NODES = read_synonyms(LIST)


@pytest.mark.parametrize("caption, objects", [
    ("Two DOGS, a puppy and three cats.", "dog, dog, cat"), ("men, women and children", "person, person, person"),
    ("policemen on ponies", "person, horse"), ("geese, mice, oxen, calves, sheep", "bird, mouse, cow, cow, sheep"),
    ("knives and forks", "knife, fork"), ("buses beside a bus", "bus, bus"), ("Benches; toothbrushes", "bench, toothbrush"),
    ("scissors, skis and ties", "scissors, skis, tie"), ("a man's dog", "person, dog"), ("the dogs' ball", "dog, sports ball"),
    ("two hot dogs", "hot dog"), ("a hot, dog", "dog"), ("fire hydrants", "fire hydrant"), ("a train track", ""),
    ("home plate, a plate", "plate"), ("a baby car", "person, car"), ("baby bears and adult birds", "bear, bird"),
    ("a passenger jet, passenger trains", "airplane, train"), ("a bow tie", "tie"), ("wine glasses, glasses", "wine glass"),
    ("the toilet seat", "toilet"), ("the seat of a toilet", "toilet"), ("the seat of a bus", "chair, bus"),
    ("motor bikes and sports balls", "motorcycle, sports ball"), ("teddy bears", "teddy bear"), ("he cares, as it does", ""),
    ("a dog-house", ""), ("", "")])
def test_the_objects_of_a_caption_by_hand(caption, objects):
    assert ", ".join(caption_objects(caption, NODES)) == objects


def test_a_line_names_the_node_first_and_of_two_lines_the_later_counts():
    assert read_synonyms("a, b c ,d\n\nd, e\n,\n") == {"a": "a", "b c": "a", "d": "d", "e": "d"}


PLURALS = """men women kids children ladies guys babies passengers policemen bicycles bikes cars vans taxis motorcycles airplanes
planes jets buses trams boats canoes ferries hydrants benches birds geese seagulls cats kittens dogs puppies horses ponies lambs
cows oxen calves bears umbrellas ties balls gloves forks knives sandwiches chairs seats couches sofas tables toilets mice phones
toothbrushes plates trains persons mans womans childs peoples buss""".split()
SINGULARS = """man woman kid child lady guy baby passenger policeman bicycle bike car van taxi motorcycle airplane plane jet bus
tram boat canoe ferry hydrant bench bird goose seagull cat kitten dog puppy horse pony lamb cow ox calf bear umbrella tie ball
glove fork knife sandwich chair seat couch sofa table toilet mouse phone toothbrush plate train person man woman child
people bus""".split()


def test_in_17652_real_captions_every_word_is_read_as_a_table_written_by_hand_says(shared):
    """The judge: a table of plurals, and a search for each of the few phrases that are more than their words."""
    table = dict(zip(PLURALS, SINGULARS, strict=True))
    animals = "bird|cat|dog|horse|sheep|cow|bear|animal|elephant|zebra|giraffe|cub"
    phrases = re.compile(rf"\b(hot dog|teddy bear|(baby|adult) ({animals})|passenger (jet|train)|train track|home plate|bow tie"
                         r"|toilet|fire hydrant|traffic|street|cell|wine|sports? ball|mobile phone|baseball glove|motor"
                         r"|air plane)s?\b")
    with gzip.open(shared / "data/text_only/coco/captions_val2017.json.gz", "rt") as file:
        captions = [a["caption"] for a in json.load(file)["annotations"]]
    checked, mentions = 0, Counter()
    for caption in captions:
        if not phrases.search(caption.lower()):
            words = re.findall(r"[a-z0-9./-]+", caption.lower())
            words = [table.get(word.strip("./-"), word.strip("./-")) for word in words]
            expected = [NODES[word] for word in words if word in NODES]
            assert caption_objects(caption, NODES) == expected, caption
            checked, mentions = checked + 1, mentions + Counter(expected)
    assert len(captions) == 17652 and checked > 15000 and mentions.total() > 13000 and len(mentions) > 30


def test_chair_is_invented_mentions_captions_that_invent_and_found_truth():
    captions = ["a dog and a dog and a cat", "a man", "a green thing"]
    truths = [{"cat", "bird"}, {"person"}, {"bus"}]
    assert chair(captions, truths, NODES) == {"chair_s": 1 / 3, "chair_i": 2 / 4, "recall": 2 / 4}
    assert chair(["nothing"], [set()], NODES) == {"chair_s": 0, "chair_i": 0, "recall": 0}
    with pytest.raises(ValueError, match="shorter"):
        chair(["a dog"], [], NODES)


# ---- the command
@pytest.fixture
def root(shared, tmp_path):
    """Two real pictures of Karpathy's val split, with instances made by hand."""
    images = [x for x in json.loads((shared / "data/coco/dataset_coco.json").read_text())["images"] if x["split"] == "val"]
    at = tmp_path / "coco/annotations"
    at.mkdir(parents=True)
    (tmp_path / "coco/dataset_coco.json").write_text(json.dumps({"images": images}))
    first, second = (x["cocoid"] for x in images)
    (at / "instances_val2014.json").write_text(json.dumps({
        "images": [{"id": first}, {"id": second}], "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dining table"}],
        "annotations": [{"image_id": first, "category_id": 7}, {"image_id": first, "category_id": 7},
                        {"image_id": second, "category_id": 9}]}))
    (tmp_path / "synonyms.txt").write_text(LIST)
    (tmp_path / "mine.json").write_text(json.dumps([{"image_id": first, "caption": "a woman, a kitten and a dog at a table"},
                                                    {"image_id": second, "caption": "a table"}]))
    return tmp_path


def run(root):
    return score.main([str(root / "mine.json"), "--chair", str(root / "synonyms.txt"), "--data", str(root)])


def test_truth_is_instances_and_reference_captions(root):
    row = run(root)
    assert row["dataset"] == "coco" and row["n"] == 2 and row["chair_s"] == 50 and row["chair_i"] == 20
    assert 0 < row["recall"] < 100


def instances(root):
    return root / "coco/annotations/instances_val2014.json"


@pytest.mark.parametrize("harm, message", [
    (lambda root: (root / "synonyms.txt").unlink(), "synonyms.txt: expected a synonym list"),
    (lambda root: (root / "synonyms.txt").write_bytes(b"\xff"), "synonyms.txt: expected a synonym list"),
    (lambda root: (root / "synonyms.txt").write_text("dog\n"), "synonyms.txt: .* for every category of COCO, found:? no 'cat'"),
    (lambda root: instances(root).unlink(), "instances_val2014.json: expected .*, found no file"),
    (lambda root: instances(root).write_text('{"images": [], "categories": [], "annotations": []}'),
     "instances_val2014.json: expected COCO's instances in every picture, found:? no 139")])
def test_a_bad_file_is_named_in_one_line(root, harm, message):
    harm(root)
    with pytest.raises(InputError, match=message) as error:
        run(root)
    assert "\n" not in str(error.value)

"""Files of downstream tasks: what is read from each form, how it is split, and what is said where it is malformed."""

import gzip
import json
import struct

import numpy as np
import pytest

from experiments.tasks import Answer, Turn, load
from experiments.tasks.schemes import SchemeError, recognise
from experiments.tasks.splits import distinct


def write(path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def chat(**turn: str) -> str:
    return json.dumps({"messages": [turn]}) + "\n"


def refused(data: str) -> str:
    with pytest.raises(ValueError) as raised:
        load(data)
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text


TRAIN = (
    "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\nBlackburn NNP I-PER\n\n"
    "-DOCSTART- -X- O\n\n# # O\n"
)


@pytest.fixture
def conll(tmp_path):
    write(tmp_path / "train.txt", TRAIN)
    write(tmp_path / "dev.txt", "Bonn NNP B-LOC\r\n\r\n\r\nit PRP O\r\n")
    write(tmp_path / "test.txt", "\ufeffUN NNP B-ORG\n")
    return tmp_path


def test_conll_columns_are_sentences_documents_and_classes(conll):
    task = load(f"conll:{conll}")
    assert task.train.words == (("EU", "rejects"), ("Peter", "Blackburn"), ("#",))
    assert task.train.documents.tolist() == [1, 1, 2]
    assert task.valid.words == (("Bonn",), ("it",)) and task.test.words == (("UN",),)
    assert task.classes == ("O", "B-LOC", "B-ORG", "B-PER", "I-PER") and task.scheme == "IOB2"
    assert [[task.classes[tag] for tag in tags] for tags in task.train.tags] == [
        ["B-ORG", "O"],
        ["B-PER", "I-PER"],
        ["O"],
    ]
    assert task.description.endswith("sentences: 3 train, 2 valid, 1 test; 5 classes in IOB2")
    write(conll / "train.txt", "a O\n-DOCSTART- O\nb O\n")
    again = load(f"conll:train={conll}/train.txt,valid={conll}/dev.txt,test={conll}/test.txt")
    assert again.train.words == (("a",), ("b",)) and again.train.documents.tolist() == [0, 1]


def test_conll_tags_may_be_of_another_column(conll):
    task = load(f"conll:{conll}")
    other = load(f"conll:train={conll}/train.txt,valid={conll}/dev.txt,test={conll}/test.txt,tag=2")
    assert other.scheme is None and other.classes == ("#", "NNP", "PRP", "VBZ")
    assert other.sha256["train"] != task.sha256["train"] and len(task.sha256["train"]) == 64


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Peter NNP", "train.txt:13: expected 3 columns as above, a word and its tag among them, not 'Peter NNP'."),
        (
            "Peter\tNNP\t\n",
            "train.txt:13: expected 3 columns as above, a word and its tag among them, not 'Peter\\tNNP\\t'.",
        ),
        (
            "Bonn NNP I-LOC",
            "train.txt:13: I-LOC cannot begin a sentence in IOB2, which fits the tags best: correct the tag.",
        ),
        (
            "Bonn NNP BLOC",
            "train.txt:13: BLOC cannot begin a sentence in IOB2, which fits the tags best: correct the tag.",
        ),
    ],
)
def test_conll_lines_are_named(conll, line, expected):
    write(conll / "train.txt", TRAIN + "\n" + line + "\n")
    assert refused(f"conll:{conll}").endswith(expected)


def test_conll_says_where_it_is_not_text(conll):
    (conll / "dev.txt").write_bytes(b"one O\ntwo O\nM\xfcnchen O\n")
    assert "dev.txt:3: is not utf-8" in refused(f"conll:{conll}")


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["B-X I-X O", "B-X B-Y"], "IOB2"),
        (["I-X I-X O", "I-X B-X I-Y"], "IOB1"),
        (["B-X E-X S-Y O B-X I-X E-X"], "BIOES"),
        (["O O", "O"], None),
        (["NN VB X-Y", "-LRB-"], None),
    ],
)
def test_schemes_are_recognised(sentences, scheme):
    assert recognise([sentence.split() for sentence in sentences]) == scheme


@pytest.mark.parametrize(
    ("sentences", "place"),
    [
        (["B-X I-X", "O B-X I-Y", "I-X O", "B-X B-X"], (1, 2)),  # two violations of IOB2, more of the others
        (["B-X E-X S-X S-X", "O B-X I-X"], (1, 2)),  # nothing ends it
        (["I-X O B-X I-X", "I-X I-Y", "I-X"], (0, 2)),  # in IOB1 B only parts entities
        (["B-X U-X", "B-X I-X", "O"], (0, 1)),
    ],
)
def test_first_tag_that_breaks_the_scheme_is_found(sentences, place):
    with pytest.raises(SchemeError) as raised:
        recognise([sentence.split() for sentence in sentences])
    assert (raised.value.sentence, raised.value.word) == place


def rows(count: int) -> list[tuple[str, str]]:
    return [(f'text, "{i}"\nof two lines é\u2028', "ab"[i % 2]) for i in range(count)]


def quoted(cells) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


def test_csv_tsv_and_jsonl_give_the_same_task(tmp_path):
    found = rows(60)
    plain = [(text.replace("\n", " "), label) for text, label in found]
    csv = write(
        tmp_path / "a.csv", "id,stars,review\n" + "".join(quoted((str(i), y, x)) for i, (x, y) in enumerate(found))
    )
    no_header = write(tmp_path / "b.csv", "".join(quoted(row) for row in found))
    tsv = write(tmp_path / "a.tsv", "label\ttext\n" + "".join(f"{y}\t{x}\n" for x, y in plain))
    jsonl = write(tmp_path / "a.jsonl", "".join(json.dumps({"label": y, "text": x}) + "\n" for x, y in found))
    task = load(f"csv:{csv},text=review,label=stars")
    assert task.classes == ("a", "b")
    everything = {x: y for split in task.splits.values() for x, y in zip(split.texts, split.labels.tolist())}
    assert everything == {x: "ab".index(y) for x, y in found}
    assert load(f"csv:{no_header},header=no").sha256 == task.sha256 == load(f"jsonl:{jsonl}").sha256
    assert sorted(
        load(f"tsv:{tsv}").train.texts + load(f"tsv:{tsv}").valid.texts + load(f"tsv:{tsv}").test.texts
    ) == sorted(x for x, _ in plain)


def test_files_of_a_folder_and_other_encodings(tmp_path):
    for name, text in (("train", "müde"), ("validation", "b"), ("test-2", "c")):
        (tmp_path / f"{name}.csv").write_bytes(f"text,label\n{text},10\n{text}{text},9\n".encode("latin-1"))
    task = load(f"csv:{tmp_path},encoding=latin-1")
    assert (
        task.train.texts == ("müde", "müdemüde") and task.valid.texts == ("b", "bb") and task.test.texts == ("c", "cc")
    )
    assert task.classes == ("9", "10")
    assert "train.csv:2: is not utf-8" in refused(f"csv:{tmp_path}")
    write(tmp_path / "test-3.csv", "")
    assert "test-2.csv and test-3.csv may both be test" in refused(f"csv:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("csv", "text,label\na,b\nc\n", ":3: expected 2 columns as in the first row, not 1."),
        ("csv", 'text,label\n"a\nb",y\n" ",z\n', ":4: has no text: fill it in, or leave the row out."),
        ("csv", "text,label\na,\n", ":2: has no label: fill it in, or leave the row out."),
        ("csv", 'text,label\na,b\n"c,d\n', ":3: is not a row (unexpected end of data): expected cells in"),
        ("csv", "lable,text\na,b\n", ":1: there is no column 'label' (did you mean 'lable'?): give label="),
        ("csv", "text,label\na,b\nc,b\n", "1 classes are too few to tell apart, choose another label=."),
        ("tsv", 'text\tlabel\n"a\tb\tc\n', ":2: expected 2 columns as in the first row, not 3."),
        ("jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', ":2: expected a text or a whole number under 'label'"),
        ("jsonl", '{"text": 3, "label": 1}\n', ":1: 'text' is 3: expected a text under 'text'."),
        ("jsonl", '\n["text"]\n', ":2: expected a JSON object, not '[\"text\"]'."),
        ("jsonl", "{\n", "expected one object per line."),
        ("prompts", '{"prompt": "a", "target": ""}\n', ":1: 'target' is '': expected a text under 'target'."),
        ("prompts", '{"target": "b"}\n', ":1: expected 'prompt' and 'target', or a list under 'messages'."),
        ("prompts", '{"messages": "a"}\n', ":1: expected a list of objects with 'role' and 'content' under"),
        ("prompts", chat(role="bot", content="a"), ":1: a role is 'bot': expected one of system, user, assistant."),
        ("prompts", chat(role="user", content="a"), ":1: the assistant says nothing: expected a turn"),
        ("prompts", chat(role="assistant"), ":1: there is no 'content' among role: expected a text under 'content'."),
        ("squad", '{"data": [{"paragraphs": [{"qas": []}]}]}', ": data[0].paragraphs[0].context must be a text"),
        ("squad", "{\n\n", "expected the JSON of SQuAD."),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_by_file_and_line(tmp_path, kind, text, expected):
    suffix = {"prompts": "jsonl", "squad": "json"}.get(kind, kind)
    path = write(tmp_path / f"a.{suffix}", text)
    text = refused(f"{kind}:{path}")
    assert text.startswith(path + expected) if expected.startswith(":") else expected in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("conl:a", "(did you mean 'conll'?)"),
        ("csv", "names no files, write csv:FILE or csv:train=…,valid=…,test=…."),
        ("csv:absent.csv", "absent.csv does not exist, check the path."),
        ("csv:a.csv,b.csv", "'b.csv' is a second path, name the files as train=…,valid=…,test=…."),
        ("csv:a.csv,txt=3", "unknown option 'txt' (did you mean 'text'?)"),
        ("csv:a.csv,text=a,text=b", "'text' is given twice, keep one of them."),
        ("csv:{file},header=maybe", "header=maybe must be yes or no."),
        ("csv:a.csv,,text=a", "an item is empty, leave it out."),
        ("csv:a.csv,train=b.csv", "a.csv has no name beside train, write train=a.csv."),
        ('csv:"a.csv', 'quotes do not match, write an item with a comma as "name=a,b".'),
        ("digits:folder", "digits takes nothing beside it."),
        ("spam:train=a", "spam takes a folder only."),
        ("conll:.,tag=0", "tag=0 must be the number of a column, counted from 1."),
        ("text:", "names no files, write text:FILE"),
        ("idx:absent", "name the folder of the IDX files, as in idx:DIR."),
    ],
)
def test_what_is_wrong_with_a_source_is_one_sentence(tmp_path, data, expected):
    data = data.format(file=write(tmp_path / "a.csv", "text,label\na,b\n"))
    text = refused(data)
    assert text.startswith(f"--data={data}") and expected in text


def test_a_path_may_have_commas_in_quotes_and_a_path_alone_is_hinted_at(tmp_path):
    path = write(tmp_path / "a,b.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(99)))
    assert len(load(f'csv:"train={path}"').train) > 60
    assert f"is no task, write csv:{path}:" in refused(path)


def test_what_is_not_given_is_made_by_content_and_nothing_is_in_two_splits(tmp_path):
    texts = [f"text {i % 150}" for i in range(600)]
    lines = [f"{text},{i % 3}" for i, text in enumerate(texts)]
    first = load("csv:" + write(tmp_path / "a.csv", "text,label\n" + "\n".join(lines)))
    sets = [set(split.texts) for split in first.splits.values()]
    assert sum(map(len, sets)) == 150 == len(set.union(*sets))
    assert sum(len(split) for split in first.splits.values()) == 600
    assert all(5 <= len(held_out) <= 30 for held_out in sets[1:])
    # In another order, with others added, each stays where it is.
    more = [f"other {i},1" for i in range(50)] + lines[::-1]
    second = load("csv:" + write(tmp_path / "b.csv", "text,label\n" + "\n".join(more)))
    assert all(set(a.texts) <= set(b.texts) for a, b in zip(first.splits.values(), second.splits.values()))
    # A split that is given is as it is, and the other one is the same as before.
    third = load(f"csv:train={tmp_path}/a.csv,test={tmp_path}/b.csv")
    assert third.valid.sha256 == first.valid.sha256 and len(third.test) == 650
    tiny, empty = write(tmp_path / "c.csv", "text,label\na,b\nc,d\n"), write(tmp_path / "d.csv", "text,label\n")
    assert refused(f"csv:{tiny}").endswith(": 2 examples are too few to hold tenths out, give more.")
    assert "test has no examples, name another file." in refused(f"csv:train={tmp_path}/a.csv,test={empty}")


def test_distinct_keeps_one_of_each_and_none_that_contradicts_itself():
    assert distinct([("a", "x"), ("b", "y"), ("a", "x"), ("c", "x"), ("c", "y")]) == [("a", "x"), ("b", "y")]


def squad(answer_start: int = 8, **changes) -> dict:
    good = {"id": "1", "question": " Who? ", "answers": [{"text": "Bön", "answer_start": answer_start}]} | changes
    none = {"id": "2", "question": "When?", "answers": [], "is_impossible": True}
    return {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": "Ä is in Bön.", "qas": [good, none]}]}],
    }


def test_squad_is_read_with_and_without_answers(tmp_path):
    path = write(tmp_path / "train-v2.0.json", json.dumps(squad(), indent=1))
    write(tmp_path / "dev-v2.0.json", json.dumps(squad()))
    write(tmp_path / "test.json", json.dumps(squad(question="Where?")))
    task = load(f"squad:{tmp_path}")
    assert task.train.ids == ("1", "2") and task.train.questions == ("Who?", "When?")
    assert task.train.contexts == ("Ä is in Bön.",) * 2
    assert task.train.answers == ((Answer(8, "Bön"),), ())
    assert task.valid.sha256 == task.train.sha256 != task.test.sha256
    assert "2 examples are too few" in refused(f"squad:{path}")  # one context is one split's


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer_start": 7}, "qas[0].answers[0] is 'Bön', but at 7 the context has ' Bö'."),
        ({"answer_start": -4}, "qas[0].answers[0] is 'Bön', but at -4 the context has 'Ä i'."),
        ({"answers": []}, "qas[0] must have answers, or is_impossible to be true."),
        ({"is_impossible": True}, "qas[0] must have no answers."),
        ({"id": "2"}, "qas[1].id '2' is that of another question, expected ids that differ."),
        ({"question": " "}, "qas[0].question must be a text, as in the JSON of SQuAD."),
        (
            {"answers": [{"text": "Bön"}]},
            "qas[0].answers[0].answer_start must be a whole number, as in the JSON of SQuAD.",
        ),
    ],
)
def test_answers_must_stand_in_their_context(tmp_path, changes, expected):
    assert refused("squad:" + write(tmp_path / "a.json", json.dumps(squad(**changes)))).endswith(
        "a.json: data[0].paragraphs[0]." + expected
    )


def test_prompts_and_dialogues_are_turns(tmp_path):
    pairs = "".join(json.dumps({"en": f"one {i}", "de": f"eins {i}"}) + "\n" for i in range(40))
    task = load(f"prompts:{write(tmp_path / 'a.jsonl', pairs)},prompt=en,target=de")
    assert all(len(split) for split in task.splits.values())
    assert (Turn("user", "one 7"), Turn("assistant", "eins 7")) in sum((s.turns for s in task.splits.values()), ())
    said = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    row = json.dumps({"chat": [{"role": role, "content": text} for role, text in said]}) + "\n"
    path = write(tmp_path / "b.jsonl", row)
    task = load(f"prompts:train={path},valid={path},test={path},turns=chat")
    assert task.train.turns == (tuple(Turn(*turn) for turn in said),)


def idx(array: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def test_idx_pairs_are_images_compressed_or_not(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 5, 4), np.uint8), np.arange(80, dtype=np.uint8) % 10
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:3])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:3]))
    task = load(f"idx:{tmp_path}")
    assert task.classes == tuple("0123456789")
    np.testing.assert_array_equal(task.test.pixels, images[:3, ..., None])
    np.testing.assert_array_equal(task.test.labels, [0, 1, 2])
    assert task.test.pixels.dtype == np.uint8 and task.test.labels.dtype == np.int32
    assert len(task.train) + len(task.valid) == 80 and 1 <= len(task.valid) < 20
    for broken, expected in (
        (gzip.compress(idx(labels))[:-9], "cannot be read"),
        (gzip.compress(idx(labels[:-1])), "expected whole numbers for 80 images."),
        (gzip.compress(idx(labels)[:-1]), "has 79 bytes after its head, expected [80]: get it again."),
        (
            gzip.compress(idx(labels.astype(">i4"), 12)),
            "begins with 00000c01, expected 00000801: IDX, bytes in 1 dimensions.",
        ),
        (gzip.compress(b"\0\0\10\1\0"), "get it again."),
    ):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(broken)
        assert expected in refused(f"idx:{tmp_path}")


def test_npz_arrays_are_images_and_nothing_is_unpickled(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.random((80, 4, 4, 3)), "y_train": np.arange(80)[:, None] % 3}
    arrays |= {"x_test": rng.random((4, 4, 4, 3)), "y_test": np.array([0, 1, 3, 1])}
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    task = load(f"npz:{path}")
    assert task.classes == tuple("0123") and task.test.labels.tolist() == [0, 1, 3, 1]
    np.testing.assert_array_equal(task.test.pixels, arrays["x_test"].astype(np.float32))
    for changes, expected in (
        ({"x_train": np.array([{}], object)}, "is not an .npz file of plain arrays (Object arrays cannot be loaded"),
        ({"x_train": arrays["x_train"][:-1]}, "y_train is int64 [80, 1], expected whole numbers for 79 images."),
        ({"y_train": arrays["y_train"] / 1}, "y_train is float64 [80, 1], expected whole numbers for 80 images."),
        ({"y_train": arrays["y_train"] - 1}, "y_train has values from -1 to 1, expected classes counted from 0."),
        ({"x_train": arrays["x_train"] * np.inf}, "x_train has values that are not finite, repair them."),
        ({"x_train": arrays["x_train"][..., 0, 0]}, "x_train is float64 [80, 4], expected bytes or floats"),
        ({"x_test": arrays["x_test"][:, :2]}, "images differ in size or type between the splits"),
    ):
        np.savez(path, **(arrays | changes))
        assert expected in refused(f"npz:{path}")
    np.savez(path, other=np.zeros(3))
    assert "expected x_train and y_train among them." in refused(f"npz:{path}")
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "it is one array, not an archive of several" in refused(f"npz:{tmp_path}/one.npy")
    write(path, "text")
    assert "is not an .npz file of plain arrays" in refused(f"npz:{path}")


def test_plain_text_is_documents_or_paragraphs(tmp_path):
    paragraphs = [f"paragraph {i}\nof two lines" for i in range(60)]
    path = write(tmp_path / "a.txt", "\n\n  \n".join(paragraphs) + "\n")
    task = load(f"text:{path}")
    assert sorted(task.train.texts + task.valid.texts + task.test.texts) == sorted(paragraphs)
    only = load(f"text:test={path}")
    assert only.test.texts == (path_text(path),) and len(only.train) == len(only.valid) == 0
    for i in range(40):
        write(tmp_path / "many" / f"{i}.txt", f"document {i}\n\nof two paragraphs\n")
    task = load(f"text:{tmp_path}/many/*.txt")
    assert all(text.startswith("document") for text in task.train.texts) and len(task.train.texts) > 20
    write(tmp_path / "empty.txt", "\n")
    assert refused(f"text:{tmp_path}/empty.txt").endswith("empty.txt is empty, leave it out.")
    assert "no file matches" in refused(f"text:{tmp_path}/absent*")


def path_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()

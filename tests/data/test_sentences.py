"""Where a caption is cut into sentences."""

import itertools
import time

import numpy as np
import pytest

from scaleclip.data.sentences import sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One.", ["One."]),
        ("One. Two", ["One.", "Two"]),
        ("  One!  \t Two?\nThree\r\n\r\n Four... Five", ["One!", "Two?", "Three", "Four...", "Five"]),
        ("a line\vanother\u2028and one more", ["a line", "another", "and one more"]),
        ("a" + " " * 100_000 + "b", ["a" + " " * 100_000 + "b"]),
        ("a cat. a dog. two birds.", ["a cat.", "a dog.", "two birds."]),
        # abbreviations
        ("Dr. Lee met Mr. and Mrs. Smith. They left.", ["Dr. Lee met Mr. and Mrs. Smith.", "They left."]),
        ("Fruit, e.g. apples, i.e. food, etc. on a table. Red.", ["Fruit, e.g. apples, i.e. food, etc. on a table.", "Red."]),
        ("The U.S. flag. A U.S. Army tank.", ["The U.S. flag.", "A U.S. Army tank."]),
        ("It stands at No. 5, St. Peter's Square. Rome.", ["It stands at No. 5, St. Peter's Square.", "Rome."]),
        ("Shot at 3 p.m. on a hill. At 5 p.m. The sun.", ["Shot at 3 p.m. on a hill.", "At 5 p.m.", "The sun."]),
        ("J. K. Rowling vs. E. Blyton. Fig. 3 shows both.", ["J. K. Rowling vs. E. Blyton.", "Fig. 3 shows both."]),
        ("Das ist z.B. ein Hund von Dr. Maier. Er schläft.", ["Das ist z.B. ein Hund von Dr. Maier.", "Er schläft."]),
        # numbers and names of files
        ("A 3.5 mm jack for $4.99. Black.", ["A 3.5 mm jack for $4.99.", "Black."]),
        ("img.jpg of www.example.com at 3.5 m", ["img.jpg of www.example.com at 3.5 m"]),
        # ellipses and runs of signs
        ("Wait... what? Yes!", ["Wait... what?", "Yes!"]),
        ("A street… at night. And… rain.", ["A street… at night.", "And… rain."]),
        ("Buy now!!! Why?! Because.", ["Buy now!!!", "Why?!", "Because."]),
        # quotation marks and brackets behind the stop
        ('She said "hello." Then she left.', ['She said "hello."', "Then she left."]),
        ("A sign, “no entry.” A car waits.", ["A sign, “no entry.”", "A car waits."]),
        ("« Bonjour. » Il part.", ["« Bonjour. »", "Il part."]),
        ("(It is red.) A car [see below.] there.", ["(It is red.)", "A car [see below.] there."]),
        ("(A dog runs.) [The cat sleeps!] Both rest.", ["(A dog runs.)", "[The cat sleeps!]", "Both rest."]),
        ("(e.g.) Fido runs. A dog (see Fig. 2).", ["(e.g.) Fido runs.", "A dog (see Fig. 2)."]),
        ("(a red car) It is old. It stands.", ["(a red car) It is old.", "It stands."]),
        ("(It is red. A car stands there.", ["(It is red.", "A car stands there."]),
        # lists
        ("1. A red car. 2. A blue car.", ["1. A red car.", "2. A blue car."]),
        ("1.\nA red car.\n2.\nA blue car.", ["1. A red car.", "2. A blue car."]),
        ("* A car.\n* A dog.", ["* A car.", "* A dog."]),
        # other scripts
        ("这是猫。那是狗！对？对。", ["这是猫。", "那是狗！", "对？", "对。"]),
        ("यह है। वह है।", ["यह है।", "वह है।"]),
        ("هل هذا؟ نعم.", ["هل هذا؟", "نعم."]),
        ("یہ ہے۔ وہ ہے۔", ["یہ ہے۔", "وہ ہے۔"]),
        ("ይህ ነው። ያ ነው።", ["ይህ ነው።", "ያ ነው።"]),
        # no letter anywhere
        (". . .", [". . ."]),
        ("...", ["..."]),
        ("5. 6.", ["5. 6."]),
        ("A cat. ...", ["A cat. ..."]),
        ("\n\n", []),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_nothing_is_lost_whatever_the_text():
    parts = [
        *".!?。！।؟…\"'“”()[] \t\n\u2028abA1é漢\u0301\U0001f600\x00-*",
        "Dr.",
        "e.g.",
        "U.S.",
        "No. ",
    ]
    random = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(random.choice(parts, random.integers(30)))
        found = sentences(text)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(part.strip() == part != "" for part in found)
        assert sentences(text) == found


@pytest.mark.parametrize("sign", [".", "'", "(", "(a b.) ", "1. ", "Mr. ", "a\n", "a ", "。", "[1]", "A.B."])
@pytest.mark.parametrize("begin", ["", "("])
def test_no_text_holds_up_a_batch(begin, sign):
    text = begin + "".join(itertools.islice(itertools.cycle(sign), 20_000))
    begun = time.process_time()
    sentences(text)
    assert time.process_time() - begun < 0.3  # 40 ms at most

"""Answers in plain text, as people and models write them: data/scoring.py."""

import pytest

from data import scoring

CONTAINS = [  # an answer, responses that contain it, responses that do not
    ("Lake Ohr", "It is lake Ohr, I think.|**Lake Ohr!**|Lake-Ohr's", "Lake of Ohr|Flake Ohr|Ohr"),
    (
        "5",
        "It is 5.|5!|(5)|x=5|2+3=5|+5|5 km|...5|5, or|5 - 3|1. 5",
        "-5|−5|.5|5.1|1.5|5%|5 %|$5|5€|5 ₽|5 ¥|5 ℃",
    ),
    (
        "5",
        "_5_|5个",
        "5°C|5²|√5|±5|55|5km|5-6|5–6|5/6|1/5|5:30|5,5|5,000|2024-01-5|covid-5|5^2|a_5|US$5",
    ),
    ("-5", "x=-5.|−5|-5, so", "5|1 - 5|1-5|A-5"),
    ("-1", "1 - 2 = -1.", "1 - 2 = 1."),
    ("1000", "1,000|1'000|1\u00a0000|1000.", "1|10,000|1.000"),
    ("10001", "10,001", "1,0001"),
    ("5%", "5 %.|(5%)", "5|$5|15%"),
    ("$5.50", "$5.50.", "5.50|$5|€5.50"),
    ("½", "½.", "1½|1/2"),
    ("five", "Five!", "twenty-five|fives"),
    ("ice cream", "An ice-cream.|ice, cream", "cream ice|ice|nice cream"),
    ("C++", "In C++.|C++17", "C|C#|C+"),
    ("C", "C, of course", "C++|C++17|C#|C+|CC"),
    ("!", "!", "No!|?"),
    ("café", "Un cafe\u0301.|CAFÉ", "cafe"),  # French, composed and not
    ("eau", "L’eau|l'eau", "beau"),
    ("Straße", "Die STRASSE", "Straßen"),  # German
    ("Việt Nam", "Vie\u0323\u0302t Nam", "Viet Nam"),  # Vietnamese
    ("İstanbul", "istanbul'da|İSTANBUL", "Istanbullu"),  # Turkish
    ("москва", "Москва — столица", "в Москве"),  # Russian
    ("οδός", "ΟΔΌΣ.", "οδού"),  # Greek
    ("القاهرة", "هي القاهرة، نعم", "قاهرة"),  # Arabic
    ("שלום", "שלום!", "שלומי"),  # Hebrew
    ("दान", "यह दान है।", "दिन|दाना"),  # Hindi
    ("ดี", "คำตอบคือดีครับ", "ดุ"),  # Thai
    ("می", "می روم", "می\u200cروم"),  # Persian
    ("15", "٢ و ١٥|答えは１５です|१५", "٥|１１５"),  # digits of other scripts
    ("北京", "答案是北京。", "东京"),  # Chinese
    ("五", "五个|答案是五", "十五|五十"),
    ("東京", "東京です", "京都"),  # Japanese
    ("서울", "수도는 서울입니다.|\u1109\u1165\u110b\u116e\u11af", "서운"),  # Korean
]


@pytest.mark.parametrize("answer, right, wrong", CONTAINS)
def test_an_answer_is_found_among_whole_words_and_numbers(answer, right, wrong):
    """With sign, point and unit, and with a letter's marks, in a dozen scripts."""
    assert [said for said in right.split("|") if not scoring.contains(said, answer)] == []
    assert [said for said in wrong.split("|") if scoring.contains(said, answer)] == []


def test_an_exact_match_forgives_case_white_space_and_a_full_stop():
    """And how a letter is composed."""
    for said in ("lake ohr.", "Lake\n Ohr", "LAKE OHR"):
        assert scoring.is_exact(said, "Lake Ohr")
    for said in ("Lake Ohr!", "It is Lake Ohr", "Lake Ohrs", "Lake-Ohr"):
        assert not scoring.is_exact(said, "Lake Ohr")
    assert scoring.is_exact("cafe\u0301", "Café") and not scoring.is_exact("-5", "5")

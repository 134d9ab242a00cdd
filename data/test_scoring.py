"""Answers in plain text, as people and models write them: data/scoring.py."""

import pytest

from data import scoring

CONTAINS = [  # an answer, responses that contain it, responses that do not
    ("Lake Ohr", "It is lake Ohr, I think.|**Lake Ohr!**|Lake-Ohr's", "Lake of Ohr|Flake Ohr|Ohr"),
    ("5", "It is 5.|5!|(5)|x=5|2+3=5|+5|5 km|...5|5, or", "-5|−5|.5|5.1|1.5|5%|5 %|$5|5€|5 ₽"),
    ("5", "5+3|5 - 3|1. 5|_5_|5个", "5²|√5|±5|5km|5-6|5–6|5-$6|5/6|5:30|5,5|5,000|covid-5|5^2|a_5"),
    ("-5", "x=-5.|−5|－5, so", "5|1 - 5|1-5|A-5"),
    ("10001", "10,001|10'001|10\u00a0001|10001.", "10|1,0001|10.001"),
    ("5°", "5°.|5 °, so", "5°C|5"),
    ("five", "Five!", "twenty-five|fives|5"),
    ("ice cream", "An ice-cream.|ice, cream", "cream ice|ice|nice cream"),
    ("C++", "In C++.|C++17", "C|C#|C+"),
    ("C", "C, of course", "C++|C#|C+|CC"),
    ("!", "!", "No!|?"),
    ("café", "Un cafe\u0301.|CAFÉ", "cafe"),  # French, composed and not
    ("eau", "L’eau|l'eau", "beau"),
    ("Straße", "Die STRASSE", "Straßen"),  # German
    ("İstanbul", "istanbul'da|İSTANBUL", "Istanbullu"),  # Turkish
    ("दान", "यह दान है।", "दिन|दाना"),  # Hindi
    ("ดี", "คำตอบคือดีครับ", "ดุ"),  # Thai
    ("ด", "ด", "ดี"),
    ("می", "می روم", "می\u200cروم"),  # Persian
    ("15", "٢ و ١٥|答えは１５です|१५", "٥|１１５"),  # digits of other scripts
    ("五", "五个|答案是五", "十五|五十"),  # Chinese
    ("東京", "東京です", "京都"),  # Japanese
    ("서울", "수도는 서울입니다.|\u1109\u1165\u110b\u116e\u11af", "서운"),  # Korean
]


@pytest.mark.parametrize("answer, right, wrong", CONTAINS)
def test_an_answer_is_found_among_whole_words_and_numbers(answer, right, wrong):
    """With sign, point and unit, and with a letter's marks, in many scripts."""
    assert [said for said in right.split("|") if not scoring.contains(said, answer)] == []
    assert [said for said in wrong.split("|") if scoring.contains(said, answer)] == []


def test_an_exact_match_forgives_case_white_space_and_a_full_stop():
    """And how a letter is composed."""
    same = ("un’école.", "UN'E\u0301COLE", " Un'école\n")
    for said in (*same, "Un'école!", "École", "-un'école"):
        assert scoring.is_exact(said, "Un'école") == (said in same)

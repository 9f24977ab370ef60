"""Pairs that can't teach anything, and prompts with all the responses that share them, worked out by hand."""

from dataclasses import replace

from spinlm.data.pairs import Group, Pair, by_prompt, drop_identical, group_pairs

FIRST = Pair([1, 2], [3], [4, 5, 6], -1.5, -2.5, synthetic_truncated=True)
OTHER_PROMPT = Pair([7], [3], [9, 8], -0.25, -4.0)


def test_identical_responses_are_dropped_and_counted() -> None:
    same, cut = Pair([1], [2, 3], [2, 3], 0.0, 0.0), Pair([1], [2, 3], [2], 0.0, 0.0)
    assert drop_identical([FIRST, same, cut, OTHER_PROMPT, same]) == ([FIRST, cut, OTHER_PROMPT], 2)
    assert drop_identical([same]) == ([], 1)
    assert drop_identical([]) == ([], 0)


def test_pairs_with_a_prompt_in_common_are_found_in_order_of_appearance() -> None:
    prompts = [[5], [1, 2], [5], [1], [1, 2], [5]]
    pairs = [replace(FIRST, prompt_ids=prompt) for prompt in prompts]
    assert by_prompt(pairs) == [[0, 2, 5], [1, 4], [3]]
    assert by_prompt([]) == []


def test_each_prompt_is_there_once_with_each_of_its_different_responses_once() -> None:
    pairs = [
        FIRST,  # 0: [3], 1: [4, 5, 6]
        OTHER_PROMPT,  # 3: [3], another prompt's; 4: [9, 8]
        replace(FIRST, synthetic_ids=[5]),  # 0 again, 2: [5]
        replace(FIRST, real_ids=[4, 5, 6], synthetic_ids=[3]),  # the first one, the other way round
    ]
    grouped = group_pairs(pairs)
    assert grouped.groups == [Group([1, 2], [(3,), (4, 5, 6), (5,)]), Group([7], [(3,), (9, 8)])]
    assert grouped.real == [0, 3, 0, 1]
    assert grouped.synthetic == [1, 4, 2, 0]
    assert grouped.initial == grouped.synthetic, "no pair has a response of the starting player's"


def test_the_starting_players_response_is_one_more_of_its_prompt() -> None:
    pairs = [replace(FIRST, initial_ids=[3]), replace(FIRST, synthetic_ids=[5], initial_ids=[8, 9]), OTHER_PROMPT]
    grouped = group_pairs(pairs)
    assert grouped.groups == [Group([1, 2], [(3,), (4, 5, 6), (5,), (8, 9)]), Group([7], [(3,), (9, 8)])]
    assert grouped.real == [0, 0, 4]
    assert grouped.synthetic == [1, 2, 5]
    assert grouped.initial == [0, 3, 5]


def test_what_is_measured_against_is_the_opponent_unless_another_is_given() -> None:
    assert FIRST.reference_logprobs == (-1.5, -2.5)
    mixed = replace(FIRST, reference_real_logprob=-1.0, reference_synthetic_logprob=-3.0)
    assert mixed.reference_logprobs == (-1.0, -3.0)


def test_a_pairs_numbers_lead_to_its_responses() -> None:
    pairs = [Pair([i % 3], [i % 2, 9], [i, 8], 0.0, 0.0) for i in range(12)]
    grouped = group_pairs(pairs[::-1])
    responses = [(one.prompt_ids, list(ids)) for one in grouped.groups for ids in one.responses]
    assert [responses[number] for number in grouped.real] == [(p.prompt_ids, p.real_ids) for p in pairs[::-1]]
    assert [responses[number] for number in grouped.synthetic] == [(p.prompt_ids, p.synthetic_ids) for p in pairs[::-1]]
    assert len(responses) == 3 * 2 + 12

from rac_modifier.measure.teacher_forcing import batches_of_like_length, padded


def test_batches_hold_what_fits_once_padded_and_pad_on_the_right():
    sequences = [([5] * n, 1) for n in (2, 9, 4, 3)]
    batches = list(batches_of_like_length(sequences, 8))
    assert [[len(ids) for ids, _ in batch] for batch in batches] == [[2, 3], [4], [9]]
    ids, completion = padded(batches[0])
    assert ids.tolist() == [[5, 5, 0], [5, 5, 5]]
    assert completion.tolist() == [[False, True, False], [False, True, True]]
    two = [([5] * n, 1) for n in (4, 3)]
    assert [len(batch) for batch in batches_of_like_length(two, 8)] == [2]  # an exact fit
    assert [len(batch) for batch in batches_of_like_length(two, 7)] == [1, 1]

from derain.metrics.sequences import mean_row, sequence_rows


def test_sequences_have_the_means_of_their_frames():
    rows = [
        {"name": "b/1", "sequence": "b", "psnr": 20.0, "flicker": None},
        {"name": "b/2", "sequence": "b", "psnr": 22.0, "flicker": 4.0},
        {"name": "photo", "sequence": "", "psnr": 50.0, "flicker": None},
        {"name": "a/1", "sequence": "a", "psnr": 30.0, "flicker": None},
    ]
    sequences = sequence_rows(rows)
    assert sequences == [
        {"sequence": "b", "frames": 2, "psnr": 21.0, "flicker": 4.0},
        {"sequence": "a", "frames": 1, "psnr": 30.0, "flicker": None},
    ]
    assert mean_row(rows) == {"psnr": 30.5, "flicker": 4.0}
    assert mean_row(sequences) == {"psnr": 25.5, "flicker": 4.0}


def test_images_without_sequences_have_no_rows():
    assert sequence_rows([{"name": "1", "psnr": 20.0}]) == []

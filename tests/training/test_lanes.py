import pytest

from cdm_ray.training.lanes import deal_lanes, micro_steps


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("lanes_per_pass", [None, 1, 2, 3, 100])
def test_every_lane_counts_once_and_all_workers_pass_equally_often(lanes, workers, lanes_per_pass):
    if workers > lanes:
        with pytest.raises(ValueError, match="cannot be dealt"):
            deal_lanes(lanes, workers)
        return
    dealt = deal_lanes(lanes, workers)
    schedules = [micro_steps(dealt, rank, lanes_per_pass) for rank in range(workers)]
    counted = [
        lane for schedule in schedules for micro in schedule if micro.counts for lane in micro.lanes
    ]
    assert counted == list(range(lanes))
    assert len({len(schedule) for schedule in schedules}) == 1
    for schedule in schedules:
        for micro in schedule:
            assert 1 <= len(micro.lanes) <= (lanes_per_pass or lanes)

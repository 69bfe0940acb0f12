"""`make bench`: one file an area, each figure beside its ceiling or its peer in the same run; medians of several."""

"""Evaluation of models: val_bpb on fixed rows, and CORE on the tasks of a bundle."""

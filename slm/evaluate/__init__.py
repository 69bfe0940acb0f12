"""What a model is worth: val_bpb on fixed rows."""

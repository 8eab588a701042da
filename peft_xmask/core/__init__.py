"""What needs no model and no PEFT: files, fingerprints, packing, sites, adapters and masks as plain tensors."""

"""The contract between export and runtime (spec, manifest) and the inference back-ends."""

"""The methods: each a PEFT tuner."""

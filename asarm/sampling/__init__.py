"""Samplers: one token a call, any-subset speculative decoding, and the biased parallel baseline."""

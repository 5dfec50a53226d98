"""Evaluation of frozen features: k-NN, linear and attentive probes, reconstruction figures."""

"""Prediction types of diffusers' discrete schedulers; flow models have tests of their own."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

"""Conversions between MHA, GQA and MQA: what is planned, and one layer."""

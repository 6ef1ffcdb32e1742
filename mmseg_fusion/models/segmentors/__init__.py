"""Segmentors."""

from .car_encoder_decoder import CAREncoderDecoder, merge_car

__all__ = ['CAREncoderDecoder', 'merge_car']

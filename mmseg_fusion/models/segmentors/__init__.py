"""Segmentors."""

from .car_encoder_decoder import CARCascadeEncoderDecoder, CAREncoderDecoder, merge_car

__all__ = ['CARCascadeEncoderDecoder', 'CAREncoderDecoder', 'merge_car']

_base_ = './sa_lite0-d16_1xb4-1k_camvid-180x240.py'
model = dict(type='CAREncoderDecoder', car=dict(channels=64))

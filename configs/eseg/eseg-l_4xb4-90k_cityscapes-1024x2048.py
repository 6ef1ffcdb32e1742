_base_ = [
    '../_base_/models/eseg-l.py',  # ESeg-L
    '../_base_/datasets/cityscapes_1024x2048.py',  # four crops of 1024 x 2048 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_90k_cosine-ema.py'  # SGD, cosine decay, EMA
]
crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor)

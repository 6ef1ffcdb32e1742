_base_ = [
    '../_base_/models/eseg-l.py',  # ESeg-L
    '../_base_/datasets/ade20k.py',  # 150 classes, four crops of 512 x 512 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_80k_cosine-ema.py'  # SGD, cosine decay, EMA
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        num_classes=150,
        # Chosen: a sixteenth of the crop, as on Cityscapes.
        sampler=dict(min_kept=16384)))

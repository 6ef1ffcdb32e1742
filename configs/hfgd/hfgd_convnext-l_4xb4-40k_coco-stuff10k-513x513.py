_base_ = [
    '../_base_/models/hfgd_convnext-l.py',  # HFGD with ConvNeXt-L
    '../_base_/datasets/coco-stuff10k_513x513_photometric.py',  # COCO-Stuff 10k, batch 4 per GPU, photometric distortion
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_adamw_wd0.05.py'  # AdamW, lr 4e-5, wd 0.05, 40k
]
custom_imports = dict(imports=['mmseg_fusion', 'mmpretrain.models'], allow_failed_imports=False)
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
model = dict(
    type='CAREncoderDecoder',
    car=dict(layer='encoder.out_conv'),
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=171))
